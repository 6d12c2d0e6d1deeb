"""Tables of URLs to shards: the plan without network, img2dataset itself against a real server on this machine."""

import csv
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_tools import _download, _img2dataset, _urls
from data_tools.__main__ import main
from data_tools.sources import jsonl, table
from data_tools.sources.base import Options
from pretrain.data import format as shards
from tests.data_tools.pictures import read, small

ROOT = Path(__file__).resolve().parents[2]
PAGE = b"<html>no picture</html>"
pq = pytest.importorskip("pyarrow.parquet")


def large(number: int, side: int = 600) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side // 2), (number, 80, 20)).save(out, "JPEG")
    return out.getvalue()


class Site(http.server.BaseHTTPRequestHandler):
    """Pictures by number, and every way in which a site can refuse one."""

    asked: dict[str, int] = {}  # noqa: RUF012 (one site a test run)
    agents: set[str] = set()  # noqa: RUF012
    delay = 0.0

    def do_GET(self) -> None:
        kind, number = self.path.strip("/").split("/")
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        self.agents.add(self.headers["User-Agent"])
        time.sleep(self.delay)
        if kind == "missing":
            self.send_error(404)
            return
        if kind == "busy" and self.asked[self.path] <= 2:
            self.send_error(503)
            return
        data = {"large": large, "busy": large}.get(kind, lambda n: small(n, "JPEG"))(int(number))
        self.send_response(200)
        if kind == "optout":
            self.send_header("X-Robots-Tag", "noai")
        data = PAGE if kind == "page" else data
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:50] if kind == "short" else data)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Site.asked.clear()
    Site.delay = 0.0
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_plan_leaves_out_what_is_no_url(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    source.write_text(
        "url,caption,width,sha256\nhttp://a/1,one,3,AB\nfile:///etc/passwd,two,3,\n"
        "pictures/x.jpg,three,,\nHTTPS://b/2,,4,\n,five,,\nhttps://b/3,six,5,cd\nhttps://b/4,one,cell,too,many\n"
    )
    options = Options(image="url", caption="caption")
    plan = _urls.write(table, source, options, hashes="sha256", folder=tmp_path / "urls", shard_size=1)
    assert plan == _urls.read(tmp_path / "urls")
    assert (plan.rows, plan.columns, plan.hashed) == (2, ["source_width"], True)
    assert plan.left_out == {
        "not a URL of http or https": 1, "not a URL": 1, "no caption": 1, "no image path under 'url'": 1,
        "row has another number of cells than the header": 1,
    }  # fmt: skip
    (part,) = (tmp_path / "urls").glob("*.parquet")
    assert pq.read_table(part).to_pylist() == [
        {"url": "http://a/1", "caption": "one", "sha256": "ab", "source_width": "3"},
        {"url": "https://b/3", "caption": "six", "sha256": "cd", "source_width": "5"},
    ]


def test_plan_of_json_lines_with_uneven_keys(tmp_path: Path) -> None:
    rows = [{"url": f"http://a/{at}", "caption": f"c{at}"} for at in range(5)]
    rows[1] |= {"score": 1}
    rows[2] |= {"score": "high", "captions": ["x", "y"]}
    rows[4] |= {"score": None, "only": None}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = Options(image="url", caption="caption")
    plan = _urls.write(jsonl, tmp_path / "t.jsonl", options, hashes="sha256", folder=tmp_path / "urls", shard_size=2)
    assert (plan.columns, plan.hashed) == (["score", "captions", "only"], False)
    (part,) = (tmp_path / "urls").glob("*.parquet")
    found = pq.read_table(part).to_pylist()
    assert [row["score"] for row in found] == [None, "1", "high", None, None]
    assert found[2]["captions"] == ["x", "y"]


def test_report_counts_time_once() -> None:
    def told(begin: float, end: float, reasons: dict[str, int]) -> dict:
        bad = sum(reasons.values())
        return {"count": 10, "successes": 10 - bad, "failed_to_download": bad, "failed_to_resize": 0,
                "start_time": begin, "end_time": end, "status_dict": {"success": 10 - bad, **reasons}}  # fmt: skip

    report = _download.summary(
        [
            told(0, 4, {"timed out": 2}),
            told(2, 5, {}),
            told(100, 101, {"timed out": 1, "HTTP Error 404: Not Found": 1}),
        ],
        [_urls.Plan(30, [], False, {"no caption": 1})],
    )
    assert (report["samples"], report["urls"], report["seconds"], report["urls_per_s"]) == (26, 30, 6.0, 5.0)
    assert report["reasons"] == {"timed out": 3, "HTTP Error 404: Not Found": 1}
    assert report["left_out"] == {"no caption": 1}


@pytest.mark.parametrize(
    ("name", "text", "words", "sentence", "code"),
    [
        ("t.csv", "URL,TEXT\nhttp://a,b\n", [], "no column 'url'", 2),
        ("t.csv", "url,caption\n", [], "nothing to fetch", 2),
        ("t.json", "{}", [], "is no table", 2),
        ("t.csv", "url,caption\nhttp://a,b\n", ["--python", "/no/such/python"], "is no Python that runs", 2),
    ],
)
def test_sentences(tmp_path: Path, capsys, name: str, text: str, words: list[str], sentence: str, code: int) -> None:
    (tmp_path / name).write_text(text)
    words = ["fetch", str(tmp_path / name), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c"), *words]
    assert main(words) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def python(path: Path, *, version: str = "3 11", code: int = 1) -> str:
    """Write a program that answers as a Python does whose venv fails."""
    path.write_text(
        f"#!/bin/sh\ncase $2 in -c) echo {version};; *) echo 'Error: ensurepip is not there' >&2; exit 1;; esac\n"
    )
    path.chmod(0o755)
    return str(path)


def test_an_environment_that_cannot_be_made_is_a_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "t.csv").write_text("url,caption\nhttp://127.0.0.1:1/a,b\n")
    words = ["fetch", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c")]
    assert main([*words, "--python", python(tmp_path / "old", version="3 13")]) == 2
    assert "needs Python 3.11 or 3.12" in capsys.readouterr().err
    assert main([*words, "--python", python(tmp_path / "bare")]) == 1
    said = capsys.readouterr().err
    assert "venv could not make img2dataset's environment (Error: ensurepip is not there): install python3-venv" in said
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()], "nothing half-made is left"


def test_a_url_in_build_says_which_command_is_meant(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\nhttps://a/b.jpg,c\n")
    assert main(["build", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 1
    assert "python -m data_tools fetch" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_damaged_tars_are_fetched_again(tmp_path: Path) -> None:
    args = type("Args", (), {"out": tmp_path, "prefix": "train"})
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(2):
        with shards.ShardWriter(raw / f"{number:05d}.tar") as writer:
            writer.add("a", {"jpg": small(1, "JPEG"), "txt": b"c"})
        (raw / f"{number:05d}_stats.json").write_text("{}")
    data = (raw / "00001.tar").read_bytes()
    (raw / "00001.tar").write_bytes(data[:700])
    (raw / "00002.tar").write_bytes(data)  # without stats: not finished
    assert _download._publish(args, raw, first=3) == 1
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["train-00003.idx", "train-00003.tar"]
    assert [p.name for p in raw.glob("*_stats.json")] == ["00000_stats.json"]
    shards.index_path(tmp_path / "train-00003.tar").unlink()  # killed between the two
    assert _download._publish(args, raw, first=3) == 0
    assert len(read(tmp_path)) == 1


def write_table(path: Path, site: str, kinds: list[str]) -> Path:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption", "score", "sha256"])
        for at, kind in enumerate(kinds):
            data = large(at) if kind in ("large", "busy") else small(at, "JPEG")
            data = PAGE if kind == "page" else data
            digest = "0" * 64 if kind == "changed" else hashlib.sha256(data).hexdigest()
            rows.writerow([f"{site}/{kind}/{at}", f"caption {at}", at / 10, digest])
    return path


KINDS = ["small", "large", "missing", "page", "optout", "changed", "busy", "short"] * 5


@pytest.mark.slow
def test_real_server(site: str, tmp_path: Path, capsys) -> None:
    source, out = write_table(tmp_path / "t.csv", site, [*KINDS, "missing"]), tmp_path / "out"
    words = ["fetch", str(source), "--out", str(out), "--shard-size", "20", "--processes", "2", "--threads", "4"]
    words += ["--retries", "0", "--timeout", "3"]
    assert main(words) == 0, (out / ".fetch" / "img2dataset.log").read_text()
    report = json.loads((out / "fetch-report.json").read_text())
    assert (report["urls"], report["samples"], report["failed_to_resize"]) == (41, 10, 5)
    assert report["reasons"]["HTTP Error 404: Not Found"] == 6
    assert report["reasons"]["HTTP Error 503: Service Unavailable"] == 5
    assert report["reasons"]["Use of image disallowed by X-Robots-Tag directive"] == 5
    assert report["reasons"]["hash mismatch"] == 5
    assert report["reasons"]["IncompleteRead(N bytes read, N more expected)"] == 5
    assert "diptych" in " ".join(Site.agents)
    found = {json.loads(m["json"])["url"].removeprefix(site): m for m in read(out).values()}
    assert found["/small/0"]["jpg"] == small(0, "JPEG"), "what fits is stored as it came"
    with Image.open(io.BytesIO(found["/large/1"]["jpg"])) as image:
        assert image.size == (512, 256), "the shorter side becomes --size"
    assert (found["/large/1"]["txt"], json.loads(found["/large/1"]["json"])["score"]) == (b"caption 1", "0.1")
    asked = dict(Site.asked)
    assert main(words) == 0
    assert Site.asked == asked, "nothing is asked twice"
    Site.asked.update({path: 9 for path in Site.asked if path.startswith("/busy")})
    assert main([*words, "--passes", "2"]) == 0
    assert set(Site.asked) == set(asked)
    assert sum(Site.asked[path] > asked[path] for path in asked if "missing" in path) == 0, "a 404 is final"
    report = json.loads((out / "fetch-report.json").read_text())
    assert (report["samples"], report["passes"]) == (15, [41, 10])
    assert main(words) == 0
    assert json.loads((out / "fetch-report.json").read_text()) == report, "a pass that was made is not forgotten"
    names = [path.name for path in sorted(out.glob("*.tar"))]
    assert names == ["train-00000.tar", "train-00001.tar", "train-00003.tar"], "a shard without a picture is none"
    assert set(shards.read_manifest(out)["shards"]) == set(names)
    assert main(["validate", str(out), "--decode"]) == 0
    assert main(["build", str(out), "--kind", "webdataset", "--out", str(tmp_path / "built")]) == 0
    assert len(read(tmp_path / "built")) == 15
    capsys.readouterr()
    assert main([*words, "--size", "100"]) == 2
    assert "was begun with another size (256 then, 100 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_goes_on_after_sigkill(site: str, tmp_path: Path) -> None:
    source, out = write_table(tmp_path / "t.csv", site, ["small"] * 120), tmp_path / "out"
    command = [sys.executable, "-m", "data_tools", "fetch", str(source), "--out", str(out), "--shard-size", "10",
               "--processes", "1", "--threads", "1"]  # fmt: skip
    Site.delay = 0.05
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    raw = out / ".fetch" / "pass-0" / "img2dataset"
    while len(list(raw.glob("*_stats.json"))) < 3 and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(0.5)
    count = sum(Site.asked.values())
    time.sleep(1.0)
    assert sum(Site.asked.values()) == count, "img2dataset has ended with the process that started it"
    kept = {p.name for p in raw.glob("*_stats.json")}
    assert 3 <= len(kept) < 12, "killed too early or too late to prove anything"
    before = dict(Site.asked)
    Site.delay = 0.0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(Site.asked[path] > before[path] for path in before) <= 10 + 2, "finished shards are not asked for again"
    assert len(read(out)) == 120
    assert not [p for p in _processes() if str(out) in p], "no process is left"


def _processes() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if "_fetch_child" in line]


@pytest.mark.slow
def test_a_download_that_stops_or_hangs(tmp_path: Path, monkeypatch) -> None:
    """A program in img2dataset's place: one that leaves early, and one that does all and never leaves."""
    pid = tmp_path / "pid"
    early = tmp_path / "early"
    early.write_text("#!/bin/sh\necho 'No space left' >&2\nexit 3\n")
    hangs = tmp_path / "hangs"
    hangs.write_text(
        f"#!/bin/sh\necho $$ > {pid}\nprintf '{{\"count\": 7}}' > {tmp_path}/00000_stats.json\nsleep 600\n"
    )
    for path in (early, hangs):
        path.chmod(0o755)
    told: list[int] = []
    words = {"log": tmp_path / "log", "expected": 1, "progress": told.append}
    with pytest.raises(shards.ShardError, match=r"0 of 1 shards done \(exit code 3; No space left\)"):
        _img2dataset.download(early, {"output_folder": str(tmp_path)}, **words)
    monkeypatch.setattr(_img2dataset, "GRACE_S", 1.0)
    _img2dataset.download(hangs, {"output_folder": str(tmp_path)}, **words)
    assert told == [7]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
