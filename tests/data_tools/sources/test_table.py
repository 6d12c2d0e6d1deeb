"""Tables: base64 in both alphabets, OFA's files without header, stray quotation marks, columns by number."""

import base64
import json
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.sources.base import Base64Blob, is_base64
from pretrain.data.decode import BadSample
from tests.data_tools.pictures import read, small

OFA = "uniq_id,image,caption,question,refs,gt_objects,dataset_name,type"


def ofa(path: Path, number: int = 6) -> Path:
    """Write rows as OFA's vision_language_examples.tsv has them: no header, base64 second, unbalanced quotes."""
    lines = []
    for at in range(number):
        encode = base64.urlsafe_b64encode if at % 2 else base64.b64encode
        kind = "qa" if at == 2 else "caption"
        caption = "" if at == 2 else f'"the number {at}'
        cells = [str(at), encode(small(at)).decode(), caption, "what?", "yes|!+no", "a&&b", "vg", kind]
        lines.append("\t".join(cells))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("words", [["--columns", OFA], ["--image-column", "-7", "--caption-column", "2"]])
def test_ofa_with_base64(tmp_path: Path, words: list[str]) -> None:
    source = ofa(tmp_path / "examples.tsv")
    assert main(["build", str(source), "--out", str(tmp_path / "out"), "--allow-wordless", *words]) == 0
    found = read(tmp_path / "out")
    assert [members["png"] for members in found.values()] == [small(at) for at in range(6)]
    assert found["00000003"]["txt"] == b'"the number 3', "a quotation mark is a letter there"
    assert "txt" not in found["00000002"], "a question needs no caption"
    record = json.loads(found["00000002"]["json"])
    name = "refs" if words[0] == "--columns" else "column4"
    assert (record[name], len(record)) == ("yes|!+no", 6)


def test_a_headerless_table_asks_for_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = ofa(tmp_path / "examples.tsv")
    assert main(["build", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "holds a picture (cell 1), so there is no header: name the columns with" in capsys.readouterr().err
    assert main(["build", str(source), "--out", str(tmp_path / "out"), "--columns", "image,caption"]) == 2
    assert "--columns names 2 columns, its first line has 8 cells" in capsys.readouterr().err


def test_base64_under_a_header_and_paths_without_one(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(small(1)).decode()
    (tmp_path / "a.png").write_bytes(small(2))
    (tmp_path / "mixed.csv").write_text(f'image,caption\n"{url}","one, two"\na.png,a path\n')
    assert main(["build", str(tmp_path / "mixed.csv"), "--out", str(tmp_path / "out")]) == 0
    assert [(m["png"], m["txt"]) for m in read(tmp_path / "out").values()] == [
        (small(1), b"one, two"), (small(2), b"a path"),
    ]  # fmt: skip
    (tmp_path / "bare.csv").write_text("first,a.png\nsecond,a.png\n")
    words = ["--no-header", "--image-column", "1", "--caption-column", "0"]
    assert main(["build", str(tmp_path / "bare.csv"), "--out", str(tmp_path / "bare"), *words]) == 0
    assert [m["txt"] for m in read(tmp_path / "bare").values()] == [b"first", b"second"]


def test_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(small(2))
    (tmp_path / "t.tsv").write_text('image\tcaption\na.png\t"open\na.png\t5" high\n')
    assert main(["build", str(tmp_path / "t.tsv"), "--out", str(tmp_path / "out"), "--no-quotes"]) == 0
    assert [m["txt"] for m in read(tmp_path / "out").values()] == [b'"open', b'5" high']


def test_what_is_base64() -> None:
    assert is_base64(base64.b64encode(small(3)).decode())
    assert is_base64(base64.b64encode(small(3, "JPEG")).decode())
    assert not is_base64("/9j/some/folder/whose/name/begins/like/a/jpeg/picture.jpg"), "a dot is no base64"
    assert not is_base64("pictures/one.png")
    with pytest.raises(BadSample, match="base64 of the image is damaged"):
        Base64Blob("/9j/4AAQ" + "A" * 41).read()


def test_damaged_base64_is_a_bad_row(tmp_path: Path) -> None:
    rows = [base64.b64encode(small(at)).decode() for at in range(4)]
    rows[2] = rows[2][:40] + "*" + rows[2][41:]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{row},c\n" for row in rows))
    words = ["build", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--max-bad-fraction", "0.5", "--base64"]
    assert main(words) == 0
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert bad["where"] == "t.csv line 4"
    assert bad["reason"].startswith("base64 of the image is damaged")
