"""The launcher runs on a bare interpreter: nothing installed, and as old as the oldest that it promises."""

import ast
import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OLDEST = (3, 8)
SOURCES = sorted((ROOT / "launcher").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_oldest_syntax(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=OLDEST)


def test_oldest_standard_library() -> None:
    words = ["--target=3.8-", "--no-tips", "--violations", str(ROOT / "launcher")]
    start = [sys.executable, "-c", "from vermin.main import main; main()"]
    found = subprocess.run([*start, *words], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def interpreters() -> list[str]:
    """Return the oldest Python from 3.8 on that this machine has, and the one that a bare shell finds."""
    names = [f"python3.{minor}" for minor in range(8, 11)]
    found = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.8.*/bin/python3.8")))
    found += [path for name in names if (path := shutil.which(name)) and runs(path)]
    bare = shutil.which("python3", path="/usr/bin:/bin")
    return list(dict.fromkeys([*found[:1], *([bare] if bare else []), sys.executable]))


def runs(path: str) -> bool:
    return subprocess.run([path, "-c", "import ssl"], capture_output=True).returncode == 0


@pytest.mark.parametrize("python", interpreters())
def test_every_module_is_imported_with_nothing_installed(python: str, tmp_path: Path) -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES if p.name != "__init__.py"]
    names = [name for name in names if not name.endswith("__main__")]
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}"
    done = subprocess.run([python, "-I", "-S", "-B", "-c", start], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("python", interpreters())
def test_submit_prints_its_line_with_nothing_installed(python: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {name: first}\n")
    start = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module('launcher', run_name='__main__')"
    words = ["submit", "--dry-run", "--nodes", "2", "c.yaml", "--gpus-per-node=8", "train.steps=3", "a.b=it's"]
    done = subprocess.run(
        [python, "-I", "-S", "-B", "-c", start, *words], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert done.returncode == 0, done.stderr
    script = ROOT / "slurm" / "pretrain.sbatch"
    line = f"sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 {script} c.yaml train.steps=3 'a.b=it'\"'\"'s'\n"
    assert done.stdout == line
