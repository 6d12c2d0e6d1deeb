"""What a plan says before a run, beside what the run then takes; its sums, warnings and speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import config, plan, recipe
from pretrain.plan import Machines
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
VIT = "model.vision.name=vit_base_patch32_clip_224"
#: six runs whose tensors span more than ten times: what dominates is activations, states or both
RUNS = {
    "activations": ("train.batch_size=256", "zero.stage=1"),
    "stage 0": ("model.text.width=512", "model.text.layers=4", "zero.stage=0", "train.batch_size=64"),
    "stage 1": (VIT, "model.vision.args={embed_dim: 384, depth: 6, num_heads: 6}", "zero.stage=1", "model.text.width=256"),
    "stage 2": (VIT, "model.vision.args={embed_dim: 512, depth: 8, num_heads: 8}", "zero.stage=2", "train.batch_size=96"),
    "bf16": (VIT, "model.vision.args={embed_dim: 384, depth: 4, num_heads: 6, patch_size: 4}", "train.precision=bf16",
             "train.batch_size=96"),
    "stage 3": (VIT, "model.vision.args={embed_dim: 384, depth: 6, num_heads: 6}", "zero.stage=3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole config over real shards."""
    return tiny.config_file(tmp_path_factory.mktemp("plan"))


def planned(file: Path, *words: str, **machines: object) -> plan.Plan:
    return plan.resolve(config.load(recipe.Recipe, file, words), Machines(**machines))


@pytest.mark.slow
def test_memory_is_what_runs_take(file: Path) -> None:
    """Tensors within a tenth, the process within a quarter."""
    common = ("evals={}", "train.steps=3", "checkpoint={every_steps: 9, resume: none}")
    jobs = [[str(file), *common, *words, f"run.name={name.replace(' ', '')}"] for name, words in RUNS.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.memory_of_runs"],
        input=json.dumps(jobs), capture_output=True, text=True, cwd=ROOT, timeout=500, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    table, most = [], 0.0
    for name, job, real in zip(RUNS, jobs, json.loads(lines[0].removeprefix("FOUND "))):
        found = planned(file, *job[1:])
        ratio = found.memory.peak / real["tensors"]
        process = (real["before"] + plan.LIBRARIES + found.memory.peak) / real["resident"]
        table.append(f"{name}: tensors {real['tensors']:,}, planned {ratio:.3f} of it; process {real['resident']:,}, "
                     f"{process:.3f}; before {real['before']:,}; {found.memory.moment_peaks}")  # fmt: skip
        most = max(most, abs(ratio - 1) / 0.1, abs(process - 1) / 0.25)
    print("\n".join(table))
    assert most <= 1, "\n".join(table)
