"""Every command and every recipe of data_tools, found by name."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import __main__ as cli
from pretrain import registry

ROOT = Path(__file__).resolve().parents[2]
RECIPES = registry.names("data_tools.recipes")


def test_commands_are_there() -> None:
    assert {"build", "index", "validate", "tokenizer", "stats", "dedup", "filter", "reshard"} <= set(cli.commands())
    assert {"iconcaps", "openclipart"} <= set(RECIPES)


@pytest.mark.parametrize("name", cli.commands())
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m data_tools {name} " in shown.partition("xample")[2], "show an example"


@pytest.mark.parametrize("name", cli.commands())
@pytest.mark.parametrize("words", [[], ["--no-such-option"], ["/no/such/place", "--out", "/no/such/place/out"]])
def test_bad_usage_is_two_and_says_so(name: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    try:
        code = cli.main([name, *words])
    except SystemExit as left:
        code = left.code
    assert code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["validat"]) == 2
    assert "Did you mean 'validate'" in capsys.readouterr().err
    assert cli.main([]) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, capsys: pytest.CaptureFixture) -> None:
    recipe = registry.find("data_tools.recipes", name)
    assert "Source:" in recipe.__doc__, "say where it comes from"
    assert any(word in recipe.__doc__ for word in ("MIT", "Apache-2.0", "CC-BY", "CC0", "GPL", "public domain")), (
        "name the licence"
    )
    assert f"--recipe {name}" in recipe.__doc__, "show the command"
    recipe.add_arguments(argparse.ArgumentParser().add_argument_group(name))
    assert callable(recipe.build)
    with pytest.raises(SystemExit) as left:
        cli.main(["build", "--recipe", name, "--help"])
    assert left.value.code == 0
    assert f"recipe {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", registry.names("data_tools.sources"))
def test_source(name: str, tmp_path: Path) -> None:
    source = registry.find("data_tools.sources", name)
    assert all(callable(getattr(source, part)) for part in ("claims", "count", "rows"))
    assert not source.claims(tmp_path / "nowhere")
    (tmp_path / "file.unknown").touch()
    assert not source.claims(tmp_path / "file.unknown")
    assert f"  {name} " in registry.find("data_tools", "build").__doc__, "the help lists every kind"


def test_unknown_recipe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["build", "--recipe", "iconcap", "--out", "x"])
    assert left.value.code == 2
    assert "Did you mean 'iconcaps'" in capsys.readouterr().err


def test_help_works_outside_the_clone_and_without_torch(tmp_path: Path) -> None:
    script = "import sys, data_tools.__main__ as m; m.commands(); m._overview(); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, timeout=60).returncode == 0
    run = subprocess.run([sys.executable, "-m", "data_tools", "--help"], cwd=tmp_path, env=env, capture_output=True)
    assert run.returncode == 0
    assert all(name in run.stdout.decode() for name in cli.commands())
