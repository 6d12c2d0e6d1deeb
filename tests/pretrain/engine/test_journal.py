"""A process that wakes up between its look at the token and its write reaches no file of the newer start."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.format import write_atomic
from pretrain.engine import journal
from pretrain.engine.run_folder import LOGS, RunFolder


@pytest.fixture
def older(tmp_path: Path) -> RunFolder:
    """A start of a run that has written a line into each of its logs."""
    folder = RunFolder(tmp_path)
    folder.claim()
    (tmp_path / "tensorboard").mkdir()
    for name in (*LOGS, "tensorboard/events"):
        (tmp_path / name).write_text('{"step": 1}\n')
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def overtaken(older: RunFolder, seen: list[dict[str, bytes]]) -> Callable[[], None]:
    """Return a look at the token that finds all well and is followed by a newer start."""

    def check() -> None:
        older.check_token()
        RunFolder(older.path).claim()
        seen.append(tree(older.path))

    return check


def test_open_files_of_an_older_start_are_no_longer_the_run_s(older: RunFolder) -> None:
    files = [open(older.path / name, "a") for name in (*LOGS, "tensorboard/events")]  # noqa: SIM115
    RunFolder(older.path).claim()
    before = tree(older.path)
    assert all(before[name] == b'{"step": 1}\n' for name in (*LOGS, "tensorboard/events"))
    for file in files:
        file.write("late\n")
        file.close()
    assert tree(older.path) == before


def test_a_line_that_was_about_to_be_added_is_lost(older: RunFolder) -> None:
    seen: list[dict[str, bytes]] = []
    journal.append(older.path / "faults.jsonl", {"step": 2}, check=overtaken(older, seen))
    assert [tree(older.path)] == seen and journal.read(older.path / "faults.jsonl") == [{"step": 1}]


def test_a_file_that_was_about_to_get_its_name_does_not_get_it(older: RunFolder) -> None:
    seen: list[dict[str, bytes]] = []
    with pytest.raises(FileNotFoundError):
        write_atomic(older.path / "evals.jsonl", b"late\n", check=overtaken(older, seen))
    assert [tree(older.path)] == seen and "evals.jsonl" not in seen[0]
