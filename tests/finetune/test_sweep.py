"""A sweep's cells are runs of the single command; what is finished is skipped; each task of an array has its part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import claims, results, sweep
from pretrain.config import ConfigError
from pretrain.report import scores
from tests import tiny
from tests.finetune.test_main import ROOT, fine_tune, recipe_file
from tests.finetune.test_sources import bare

METHODS = "methods: {probe: {method: {name: linear_probe, c: 1.0}}, long: {train: {epochs: 2}, optim: {lr: 0.01}}}\n"


def config_file(folder: Path) -> str:
    """Write a config whose methods have sections of their own."""
    path = recipe_file(folder, name="sweep")
    path.write_text(path.read_text() + METHODS)
    return str(path)


def made(folder: Path, *words: str, methods=("coop", "probe"), shots=(1, 2), seeds=(1,)) -> list[sweep.Cell]:
    return sweep.cells(methods, shots, seeds, file=config_file(folder), out=folder / "out", words=list(words))


def test_cells_are_configs_of_the_single_command(tmp_path):
    found = made(tmp_path, "train.batch_size=2", seeds=(1, 3))
    assert [cell.name for cell in found[:3]] == ["coop-shots1-seed1", "coop-shots1-seed3", "coop-shots2-seed1"]
    assert len(found) == 8 and len({cell.name for cell in found}) == 8
    one = found[1].recipe
    assert (one.run.seed, one.task.seed, one.task.shots, one.train.batch_size) == (3, 3, 1, 2)
    assert one.run.folder == tmp_path / "out" / "coop-shots1-seed3" and one.method.length == 4
    assert found[-1].recipe.method.name == "linear_probe" and found[-1].recipe.method.c == 1.0


def test_a_method_may_have_numbers_of_shots_of_its_own(tmp_path):
    file = Path(config_file(tmp_path))
    file.write_text(file.read_text().replace("probe: {", "probe: {shots: [2, 16], "))
    found = sweep.cells(["coop", "probe"], [1, 2], [1], file=str(file), out=tmp_path / "out", words=[])
    assert [(cell.method, cell.shots) for cell in found] == [("coop", 1), ("coop", 2), ("probe", 2)]
    assert sweep.listed(str(file)) == ["probe", "long"]
    file.write_text(file.read_text().replace("[2, 16]", "few"))
    with pytest.raises(ConfigError, match=r"methods\.probe\.shots: 'few' is no list of numbers"):
        sweep.cells(["probe"], [1], [1], file=str(file), out=tmp_path / "out", words=[])
    for none in (None, str(recipe_file(tmp_path, name="bare"))):
        with pytest.raises(ConfigError, match="--methods: say which"):
            sweep.listed(none)


def test_a_methods_own_sections_are_laid_over_the_configs(tmp_path):
    [cell] = made(tmp_path, methods=["long"], shots=[1])
    assert cell.recipe.method.name == "coop" and cell.recipe.optim.lr == 0.01 and cell.recipe.optim.optimizer == "sgd"
    assert cell.recipe.train.epochs == 2 and cell.recipe.train.steps is None and cell.recipe.train.batch_size == 4
    [cell] = made(tmp_path, methods=["clip_adapter"], shots=[1])
    assert cell.recipe.method.alpha == 0.2 and cell.recipe.train.steps == 6
    own = recipe_file(tmp_path, name="mine", method="{name: coop, length: 2}")
    [cell] = sweep.cells([str(own)], [1], [1], file=None, out=tmp_path, words=[])
    assert cell.name == "mine-shots1-seed1" and cell.recipe.method.length == 2


@pytest.mark.parametrize(
    ("methods", "words", "message"),
    [
        (["cop"], [], r"--methods cop: .*Did you mean 'coop'"),
        (["coop", "coop"], [], "two cells are called coop-shots1-seed1"),
        (["coop"], ["task.name=classification"], "unknown key 'shots'"),
        (["coop", "probe"], ["method.length=-1"], "sweep, coop"),
        (["coop"], ["task.shots=4"], r"task\.shots: the sweep gives each cell its own; use --shots"),
        (["coop"], ["run.seed=7"], r"run\.seed: the sweep gives"),
        (["coop"], ["run.name=mine"], r"run\.name: the sweep gives"),
    ],
)
def test_mistakes_are_found_before_anything_runs(methods, words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, *words, methods=methods, shots=[1])
    with pytest.raises(ConfigError, match="a name needs --config FILE"):
        sweep.cells(["coop"], [1], [1], file=None, out=tmp_path, words=[])


def here(*words: str) -> int:
    """Sweep on this rank, without leaving the pool's process group."""
    args = list(words)
    file, out = args[:2]
    found = sweep.cells(["coop", "probe"], [1, 2], [1], file=file, out=Path(out), words=args[2:])
    code = sweep.run(sweep.as_shards(found, Path(out)), torch.device("cpu"))
    return code


@pytest.fixture(scope="module")
def swept(tmp_path_factory, ranks) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert ranks.run(1, here, config_file(folder), str(folder / "out")) == [0]
    return folder


def test_a_sweep_in_one_process_gives_what_single_commands_give(swept, ranks):
    for name in ("coop-shots1-seed1", "probe-shots2-seed1"):
        method, shots = name.split("-shots")[0], name.split("shots")[1][0]
        words = ["method={name: linear_probe, c: 1.0}"] if method == "probe" else []
        words += [f"run.dir={swept}/single", f"run.name={name}", f"task.shots={shots}", "task.seed=1", "run.seed=1"]
        assert ranks.run(1, fine_tune, str(recipe_file(swept, name="single")), *words) == [(0, True)]
        want, got = (load_file(swept / where / name / "delta.safetensors") for where in ("single", "out"))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
        assert scores.newest(swept / "single" / name) == scores.newest(swept / "out" / name)


def test_ones_own_pictures_are_made_shards_once(swept):
    assert sorted(path.name for path in (swept / "out" / "data").glob("*.tar")) == ["test-00000.tar", "train-00000.tar"]
    for name in ("coop-shots1-seed1", "coop-shots2-seed1"):
        assert not list((swept / "out" / name / "data").glob("test-*.tar"))


def test_finished_cells_are_skipped_and_another_config_is_refused(swept, ranks):
    runs = [path for path in (swept / "out").iterdir() if (path / "delta.safetensors").exists()]
    before = {path: (path / "delta.safetensors").stat().st_mtime_ns for path in runs}
    assert len(before) == 4
    (runs[0] / "delta.safetensors").unlink()
    assert ranks.run(1, here, config_file(swept), str(swept / "out")) == [0]
    after = {path: (path / "delta.safetensors").stat().st_mtime_ns for path in runs}
    assert [path for path in runs if before[path] != after[path]] == runs[:1]
    cells = made(swept, "optim.lr=0.5")
    assert not sweep.unfinished(sweep.as_shards(made(swept), swept / "out"))
    with pytest.raises(ConfigError, match=r"run of another config \('lr: 0\.05' there, 'lr: 0\.5' here\)"):
        sweep.unfinished(sweep.as_shards(cells, swept / "out"))


def test_the_results_are_those_of_the_runs(swept):
    said = results.write(swept / "out")
    assert "# 4 runs" in said and "| zero-shot |" in said and "not tried" in said
    tree = json.loads((swept / "out" / "results.json").read_text())
    found = scores.newest(swept / "out" / "coop-shots2-seed1")["few_shot/accuracy"][1]
    assert tree["tables"]["accuracy"]["coop"]["2"]["value"] == pytest.approx(found.value)
    assert {path.suffix for path in (swept / "out").glob("results.*")} == {".md", ".csv", ".json", ".html"}


def test_a_cell_that_fails_is_told_and_the_others_run(tmp_path, ranks):
    """A class with a name that does not fit into the prompt fails where the prompt is laid out."""
    data = bare(tmp_path / "mine")
    (data / "red_shape").rename(data / "_".join(["a_very_long_name"] * 14))
    file = config_file(tmp_path)
    assert ranks.run(1, here, file, str(tmp_path / "out"), f"task.data={data}") == [1]
    finished = {path.parent.name for path in (tmp_path / "out").glob("*/delta.safetensors")}
    assert finished == {"probe-shots1-seed1", "probe-shots2-seed1"}


@pytest.mark.slow
def test_two_ranks_sweep_as_one_does(swept, tmp_path, ranks):
    assert ranks.run(2, here, config_file(tmp_path), str(tmp_path / "out")) == [0, 0]
    for path in (swept / "out").glob("*/evals.jsonl"):
        assert (tmp_path / "out" / path.parent.name / "evals.jsonl").read_text() == path.read_text()


def test_the_shipped_sweep_is_one():
    file = ROOT / "finetune/configs/sweeps/iconcaps.yaml"
    text = file.read_text()
    assert "python -m finetune.sweep --config finetune/configs/sweeps/iconcaps.yaml" in text
    labels = sweep.listed(str(file))
    found = sweep.cells(labels, [1, 2, 4, 8, 16], [1], file=str(file), out=Path("sweeps"), words=["base=x"])
    assert {cell.method: claims.role(cell.recipe.method.model_dump()) for cell in found} == {
        **{name: name for name in ("linear_probe", "coop", "cocoop", "clip_adapter", "tip", "tip_f", "lora", "full")},
        "wise": "wise", "coop_base": "coop", "cocoop_base": "cocoop",
    }  # fmt: skip
    shots = {name: [cell.shots for cell in found if cell.method == name] for name in labels}
    assert shots["coop"] == [1, 2, 4, 8, 16] and shots["cocoop"] == shots["cocoop_base"] == [4, 16]
    assert all(cell.recipe.train is None or (cell.recipe.train.steps or 0) <= 1000 for cell in found)
    assert {role for claim in claims.CLAIMS for role in (claim.better, *claim.worse)} - {claims.ZERO} <= {
        claims.role(cell.recipe.method.model_dump()) for cell in found
    }
    by_name = {cell.method: cell.recipe for cell in found}
    assert by_name["wise"].optim == by_name["full"].optim and by_name["wise"].train == by_name["full"].train


@pytest.mark.slow
def test_the_command_as_tasks_of_an_array(swept, tmp_path):
    """Two parts make all cells; the second writes the table of both."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "finetune.sweep", "--config", config_file(tmp_path), "--methods", "coop", "probe",
        "--shots", "1", "2", "--seeds", "1", f"task.data={tiny.class_folders(tmp_path / 'mine')}",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    for cell in ("0", "1"):
        done = subprocess.run(
            [*command, "--cell", cell, "--of", "2"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "cell 1 of 2, coop-shots2-seed1\n" in done.stdout and "cell 2 of 2, probe-shots2-seed1, about" in done.stdout
    assert "# 4 runs" in done.stdout
    for path in (swept / "out").glob("*/evals.jsonl"):
        assert (tmp_path / "out" / path.parent.name / "evals.jsonl").read_text() == path.read_text()
    listed = subprocess.run([*command, "--list"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert listed.stdout.split() == [cell.name for cell in made(tmp_path)]
