"""The Open Clip Art recipe on tiny packages made here; broken and endless drawings cost only themselves."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from data_tools import _deb
from data_tools.__main__ import main
from data_tools.recipes import openclipart
from data_tools.recipes._draw import render
from data_tools.recipes._draw_each import Studio, draw
from pretrain.data import format as shards
from tests.data_tools.pictures import read

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("resvg_py")

HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/" width="100pt" height="50pt" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
)


def svg(title: str, keywords: list[str], *, body: str = '<rect width="133" height="67" fill="red"/>') -> bytes:
    """Return a drawing with the metadata that the package's have."""
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    work = (
        f"<cc:Work><dc:title>{title}</dc:title><dc:description>a\n  b</dc:description><dc:subject><rdf:Bag>{listed}"
        "</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator></cc:Work>"
    )
    return f"{HEAD}<metadata><rdf:RDF>{work}</rdf:RDF></metadata>{body}</svg>".encode()


def deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """Write a Debian package with the drawings in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def clipart(cache: Path, number: int = 40, *, more: dict[str, bytes] | None = None) -> Path:
    files = {
        f"./{openclipart.ROOT}things/thing.{at}.svg": svg(
            f"Thing{at:02d}", ["thing", f"HASH(0x{at})"], body=f'<circle r="{at + 5}" cx="60" cy="30"/>'
        )
        for at in range(number)
    }
    files.update({f"./{openclipart.ROOT}{name}": data for name, data in (more or {}).items()})
    files[f"./{openclipart.COPYRIGHT}"] = b"public domain dedication"
    files["../../outside.svg"] = b"never written"
    links = {
        f"./{openclipart.ROOT}again/twin.svg": "../things/thing.3.svg",
        f"./{openclipart.ROOT}x.svg": "/etc/passwd",
    }
    deb(cache / f"{openclipart.PACKAGE}_1_all.deb", files, links)
    return cache


def build(out: Path, cache: Path, *more: str) -> int:
    words = ["--size", "24", "--shard-size", "16", "--workers", "1", "--seconds", "2"]
    return main(["build", "--recipe", "openclipart", "--out", str(out), "--cache", str(cache), *words, *more])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipart")
    assert build(folder / "out", clipart(folder / "cache"), "--validation-fraction", "0.2") == 0
    return folder


def test_records_are_as_noisy_as_they_came(built: Path) -> None:
    found = read(built / "out")
    assert len(found) == 41
    rows = {json.loads(members["json"])["file"]: (members, json.loads(members["json"])) for members in found.values()}
    members, record = rows["thing.3"]
    assert record == {
        "captions": ["Thing03", "Thing03, thing, HASH(0x3)", "thing, HASH(0x3)"], "title": "Thing03",
        "keywords": ["thing", "HASH(0x3)"], "description": "a b", "creator": "Somebody", "file": "thing.3",
        "folder": "things",
    }  # fmt: skip
    assert members["txt"] == b"Thing03"
    with Image.open(io.BytesIO(members["png"])) as image:
        assert (image.size, image.mode) == ((24, 24), "RGB")
    assert rows["twin"][0]["png"] == members["png"], "a link inside the package is followed"
    assert "x" not in rows, "one out of it is not"
    assert sorted(p.name for p in built.iterdir()) == ["cache", "out"]
    assert "public domain dedication" in (built / "out" / "LICENSES.md").read_text()
    assert main(["validate", str(built / "out"), "--decode"]) == 0


def test_a_drawing_that_comes_twice_is_on_one_side(built: Path) -> None:
    sides = [{json.loads(m["json"])["file"] for m in read(built / "out", f"{side}-*.tar").values()}
             for side in ("train", "validation")]  # fmt: skip
    assert all(sides)
    assert sum({"twin", "thing.3"} <= side for side in sides) == 1


def test_again_costs_nothing_and_workers_do_not_matter(built: Path, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (built / "out").glob("*.tar")}
    assert build(built / "out", built / "cache", "--validation-fraction", "0.2") == 0
    assert before == {p.name: p.stat().st_mtime_ns for p in (built / "out").glob("*.tar")}
    assert build(tmp_path / "two", built / "cache", "--validation-fraction", "0.2", "--workers", "2") == 0
    for path in (built / "out").glob("[!.]*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_fewer_drawings_leave_no_old_shards(built: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "out", built / "cache") == 0
    assert build(tmp_path / "out", built / "cache", "--limit", "5", "--format", "webp") == 0
    assert len(read(tmp_path / "out")) == 5
    assert all("webp" in members for members in read(tmp_path / "out").values())
    assert set(shards.read_manifest(tmp_path / "out")["shards"]) == {p.name for p in (tmp_path / "out").glob("*.tar")}


def test_broken_drawings_are_listed(tmp_path: Path) -> None:
    more = {
        "a.svg": b"<svg",
        "b.svg": HEAD.encode() + b"</svg>",
        "c.svg": svg("C", ["c"], body='<rect width="9" height="9" fill="url(#nowhere"/>').replace(b"100pt", b"0"),
    }
    cache = clipart(tmp_path / "cache", more=more)
    assert build(tmp_path / "out", cache) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {row["where"]: row["reason"] for row in listed}
    assert reasons["a"].startswith("drawing is not XML")
    assert reasons["b"] == "drawing has neither title nor keywords"
    assert reasons["c"].startswith(("drawing cannot be rendered", "drawing crashes the renderer"))  # older: a panic
    assert len(read(tmp_path / "out")) == 41


def endless() -> str:
    """Return a drawing that keeps the renderer busy for minutes: blurs of blurs."""
    blur = '<feGaussianBlur stdDeviation="90"/>' * 20_000
    return f'{HEAD}<filter id="f">{blur}</filter><rect width="99" height="40" filter="url(#f)"/></svg>'


def test_a_drawing_without_end_costs_only_itself() -> None:
    good = svg("", []).decode()
    with Studio(size=256, kind="png", workers=1, seconds=1) as studio:
        found = list(studio.draw([good, endless(), good]))
    assert found[0] == found[2]
    assert found[0].data == draw(good, size=256, kind="png")
    assert found[1].problem == "drawing takes more than 1 s of processor time"


def test_a_process_that_is_killed_while_idle_is_replaced() -> None:
    good = svg("", []).decode()
    with Studio(size=24, kind="png", workers=1, seconds=5) as studio:
        first = list(studio.draw([good]))
        studio._hands[0].process.kill()
        studio._hands[0].process.join()
        assert list(studio.draw([good, good])) == [*first, *first]


def test_files_of_the_machine_stay_out(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (50, 50), "blue").save(out, "PNG")
    (tmp_path / "secret.png").write_bytes(out.getvalue())
    seen = []
    for link in (f"{tmp_path}/secret.png", f"file://{tmp_path}/secret.png"):
        image = f'<image xmlns:xlink="http://www.w3.org/1999/xlink" width="99" height="50" xlink:href="{link}"/>'
        with Image.open(io.BytesIO(draw(f"{HEAD}{image}</svg>", size=24, kind="png"))) as drawn:
            assert drawn.getcolors() == [(24 * 24, (255, 255, 255))]
        with Image.open(io.BytesIO(render(f"{HEAD}{image}</svg>", 24))) as drawn:
            seen.append((0, 0, 255) in dict(map(reversed, drawn.getcolors())))
    assert any(seen), "the renderer does look for files, so this proves something"


def test_pictures_are_not_stretched() -> None:
    with Image.open(io.BytesIO(draw(svg("", []).decode(), size=24, kind="png"))) as image:
        assert image.getpixel((12, 2)) == (255, 255, 255)
        assert image.getpixel((12, 12)) == (255, 0, 0)
        assert image.getpixel((12, 21)) == (255, 255, 255)


def test_without_apt_there_is_a_remedy(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(tmp_path / "out", tmp_path / "cache") == 1
    said = capsys.readouterr().err
    assert "apt-get was not found" in said
    assert str(tmp_path / "cache") in said
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert build(tmp_path / "out", tmp_path / "cache") == 1
    assert "(E: Unable to locate package): run `apt-get update` once as root" in capsys.readouterr().err
    store = clipart(tmp_path / "store", 4)
    apt.write_text(f"#!/bin/sh\ncp {store}/*.deb .\n")
    assert build(tmp_path / "out", tmp_path / "cache") == 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["openclipart-svg_1_all.deb"]


def test_a_package_that_is_cut_off_or_packed_otherwise(tmp_path: Path, capsys) -> None:
    path = clipart(tmp_path / "cache") / f"{openclipart.PACKAGE}_1_all.deb"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    assert build(tmp_path / "out", tmp_path / "cache") == 1
    assert "not a whole Debian package; delete it and run again" in capsys.readouterr().err
    path.write_bytes(whole[:-500] + b"\0" * 500)
    assert build(tmp_path / "out", tmp_path / "cache") == 1
    assert "Debian package is damaged" in capsys.readouterr().err
    path.write_bytes(whole.replace(b"data.tar.xz ", b"data.tar.zst"))
    with pytest.raises(shards.ShardError, match="use a package with"):
        _deb.read(path)


@pytest.mark.slow
def test_goes_on_after_sigkill(tmp_path: Path) -> None:
    cache, out = clipart(tmp_path / "cache", 600), tmp_path / "out"
    words = ["--size", "96", "--shard-size", "40", "--workers", "2", "--cache", str(cache)]
    command = [sys.executable, "-m", "data_tools", "build", "--recipe", "openclipart", *words, "--out"]
    run = subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list((out / ".build").glob("*.tar.json"))) < 3 and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {p: p.stat().st_mtime_ns for p in (out / ".build").glob("*.tar.json")}
    assert 3 <= len(kept) < 15, "killed too early or too late to prove anything"
    assert not (out / "dataset.json").exists()
    for folder in (out, tmp_path / "whole"):
        assert subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True).returncode == 0
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items()), "shards that were drawn are kept"
    names = {p.name for p in out.iterdir() if p.is_file()}
    assert names == {p.name for p in (tmp_path / "whole").iterdir() if p.is_file()}
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
