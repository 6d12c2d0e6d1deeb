"""A wheel of the tree carries what it needs, and its commands run where there is no clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    """Return the tracked files that exist: what a fresh clone would have."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ and an egg-info where it works."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheels"), str(folder / "tree"))
    (built,) = (folder / "wheels").glob("diptych-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = wheel.parent.parent / "site"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    return target


def test_the_wheel_has_every_module_config_and_script(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    packages = ("pretrain/", "finetune/", "data_tools/", "launcher/", "slurm/")
    wanted = {name for name in tracked() if name.startswith(packages)}
    assert {Path(name).suffix for name in wanted} >= {".py", ".yaml", ".sbatch", ".md"}
    assert wanted <= inside, f"not in the wheel: {sorted(wanted - inside)}; see package_data in setup.py"
    others = {name for name in inside - wanted if ".dist-info/" not in name}
    assert not others, f"{sorted(others)} must not be in the wheel"


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("data_tools", ["--help"], "validate"),
        ("finetune.main", ["--help"], "--print-config"),
        ("pretrain.main", ["--config", "SITE/pretrain/configs/clip_iconcaps.yaml", "--print-config"], "contrastive"),
    ],
    ids=["data_tools", "finetune", "config"],
)
def test_commands_run_without_the_clone(site: Path, tmp_path: Path, module: str, words: list[str], said: str) -> None:
    # -I: neither the working folder nor PYTHONPATH; an editable install's finder would find the clone first
    start = (
        "import runpy, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        f"sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
        f"import {module.partition('.')[0]} as package\n"
        f"assert package.__file__.startswith({str(site)!r}), package.__file__\n"
        f"sys.argv = {[module, *(word.replace('SITE', str(site)) for word in words)]!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", start], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
