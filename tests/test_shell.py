"""Every shell script of the tree parses, and shellcheck finds nothing in it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def scripts() -> list[str]:
    """Return the tracked files that are shell: by suffix, or by their first line."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file() and is_shell(ROOT / name)]


def is_shell(path: Path) -> bool:
    if path.suffix:
        return path.suffix in {".sh", ".sbatch"}
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and first.split()[-1].endswith(b"sh")


def test_all_are_found() -> None:
    assert {".ci/run", "slurm/pretrain.sbatch", "tests/oldest.sh"} <= set(scripts())


@pytest.mark.parametrize("name", scripts())
def test_parses(name: str) -> None:
    checked = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", scripts())
def test_shellcheck_is_silent(name: str) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    command = ["shellcheck", "--shell=bash", "--external-sources", name]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
