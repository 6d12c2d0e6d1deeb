"""What a plan says before a run, beside what the run then takes; its sums, warnings and speed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import config, plan, recipe
from pretrain.losses import tokens
from pretrain.plan import Machines
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
VIT = "model.vision.name=vit_base_patch32_clip_224"
#: six runs whose tensors span more than ten times: what dominates is activations, states or both
RUNS = {
    "activations": ("train.batch_size=256", "zero.stage=1"),
    "stage 0": ("model.text.width=512", "model.text.layers=4", "zero.stage=0", "train.batch_size=64"),
    "stage 1": (VIT, "model.vision.args={embed_dim: 384, depth: 6, num_heads: 6}", "model.text.width=256"),
    "stage 2": (VIT, "model.vision.args={embed_dim: 512, depth: 8, num_heads: 8}", "zero.stage=2",
                "train.batch_size=96"),
    "bf16": (VIT, "model.vision.args={embed_dim: 384, depth: 4, num_heads: 6, patch_size: 4}", "train.precision=bf16",
             "train.batch_size=96"),
    "momentum": ("model.text.width=512", "model.text.layers=4", "zero.stage=1", "train.batch_size=64",
                 "objectives={momentum_contrast: {queue: 8192}}"),
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
        input=json.dumps(jobs), capture_output=True, text=True, cwd=ROOT, timeout=1500, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    table, most = [], 0.0
    for name, job, real in zip(RUNS, jobs, json.loads(lines[0].removeprefix("FOUND "))):
        found = planned(file, *job[1:])
        ratio = found.memory.peak / real["tensors"]
        process = found.resident / real["resident"]
        table.append(f"{name}: tensors {real['tensors']:,}, planned {ratio:.3f} of it; process {real['resident']:,}, "
                     f"{process:.3f}; before {real['before']:,}; {found.memory.moment_peaks}")  # fmt: skip
        most = max(most, abs(ratio - 1) / 0.1, abs(process - 1) / 0.25)
    print("\n".join(table))
    assert most <= 1, "\n".join(table)


def test_a_plan_is_fast_and_says_what_is_wrong(file: Path) -> None:
    began = time.process_time()
    found = planned(file, "optim.warmup=9", "train.batch_size=18", world=4, cpu=False, memory=0.001)
    assert time.process_time() - began < 5
    text = found.text()
    for word in ("optim.warmup", "16 or 20", "do not fit 0.001 GiB"):
        assert word in text, text


def test_published_architectures_have_their_published_compute(tmp_path: Path) -> None:
    """ViT-B/32 takes 44.4 GFLOP a sample (three times open_clip's 7.4 GMAC), ViT-B/16 123.4."""
    for name, parameters, gflop in (("clip_vit_b32", 151_277_313, 44.4), ("clip_vit_b16", 149_620_737, 123.4)):
        read = config.load(recipe.Recipe, ROOT / f"pretrain/configs/{name}.yaml", ["train.batch_size=64"])
        found = plan.resolve(read, Machines(world=8, nodes=1, cpu=False, gpu="H100", memory=80, throughput=1000))
        assert found.step.trained == parameters
        assert found.step.flops / 1e9 == pytest.approx(gflop, rel=0.03)


def test_vl_t5_and_vl_bart_have_their_published_sizes_and_are_planned_with_regions() -> None:
    machines = Machines(world=4, nodes=1, cpu=False, gpu="H100", memory=80, throughput=1000)
    for name, parameters in (("vlt5_base", 224_540_160), ("vlbart_base", 141_155_328)):
        found, fewer = (
            plan.resolve(
                config.load(
                    recipe.Recipe,
                    ROOT / f"pretrain/configs/{name}.yaml",
                    ["train.batch_size=16", f"model.vision.regions={regions}"],
                ),
                machines,
            ).step
            for regions in (36, 4)
        )
        assert found.trained == parameters and found.parts["visual_embedding"] == 1_581_312
        assert found.batch - fewer.batch == 4 * 32 * (2048 * 4 + 4 * 4 + 8)  # of 4 rows: features, boxes, owners
        assert fewer.flops < 0.7 * found.flops


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 33_488_336), ("medium", 92_892_000), ("base", 182_238_536), ("large", 472_977_152),
     ("huge", 929_486_848)],
)  # fmt: skip
def test_every_ofa_is_planned_with_its_published_size(size: str, parameters: int) -> None:
    read = config.load(recipe.Recipe, ROOT / f"pretrain/configs/ofa_{size}.yaml", [])
    found = plan.resolve(read, Machines(world=8, nodes=1, cpu=False, gpu="H100", memory=80))
    assert found.step.trained == parameters


def test_three_spans_of_tokens_stand_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsed loss takes two spans of tokens and the last; memory and compute are those of all spans."""
    read = config.load(recipe.Recipe, ROOT / "pretrain/configs/ofa_tiny.yaml", ["train.batch_size=8"])
    for cells in (1 << 20, 1 << 22):
        monkeypatch.setitem(tokens.SPAN, "cpu", cells)
        few = plan.resolve(read, Machines(world=1)).step
        with monkeypatch.context() as patched:
            patched.setattr(tokens, "is_fake", lambda tensor: False)
            assert plan.resolve(read, Machines(world=1)).step == few


def test_zero_stages_share_states_among_ranks(file: Path) -> None:
    found = [planned(file, f"zero.stage={stage}", world=8, cpu=False).memory for stage in range(4)]
    whole = 4 * 240_505
    assert [m.parameters for m in found] == [whole, whole, whole, -(-whole // 8)]
    assert [m.moments for m in found] == [2 * whole, *[2 * -(-whole // 8)] * 3]


def test_command_prints_a_tree_and_refuses_nonsense(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert plan.main([str(file), "--json", "--gpus", "8", "--nodes", "2", "--throughput", "100"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["machines"]["world"] == 16 and tree["outlook"]["samples"] == 96 and tree["memory"]["peak"] > 0
    assert tree["seconds"] == pytest.approx(4 * 16 / 100)
    with pytest.raises(SystemExit) as error:
        plan.main([str(file), "--gpu", "abacus"])
    assert error.value.code == 2


def test_recomputed_blocks_take_less(file: Path) -> None:
    words = (VIT, "model.vision.args={embed_dim: 128, depth: 6, num_heads: 2, patch_size: 4}")
    plain, spared = planned(file, *words), planned(file, *words, "model.vision.checkpointing=1")
    assert spared.memory.activations < 0.6 * plain.memory.activations
    assert spared.step.flops == pytest.approx(plain.step.flops)


def test_micro_batches_take_less_and_a_kept_copy_more(file: Path) -> None:
    words = (VIT, "model.vision.args={embed_dim: 128, depth: 6, num_heads: 2, patch_size: 4}", "train.batch_size=64")
    plain, cut = planned(file, *words), planned(file, *words, "train.micro_batch_size=16")
    assert cut.step.rows == 16 and cut.memory.activations < 0.3 * plain.memory.activations
    assert cut.memory.peak < 0.6 * plain.memory.peak and cut.memory.data == plain.memory.data
    synchronous = planned(file, *words, "checkpoint.async=false").memory  # saved every two of four steps
    kept = plain.memory.moment_peaks["backward"] - synchronous.moment_peaks["backward"]
    assert kept == plain.memory.save > 0


def test_a_tokenizer_that_is_not_here_is_no_obstacle_where_the_vocabulary_is_fixed(file: Path) -> None:
    found = planned(file, "model.tokenizer=nowhere/at/all", "model.text.vocab_size=777")
    assert "model.tokenizer: nowhere/at/all does not exist" in found.warnings[0]
    here = planned(file, "model.text.vocab_size=600")
    assert found.step.parts["text"] - here.step.parts["text"] == (777 - 600) * 32
    with pytest.raises(config.ConfigError, match="nowhere/at/all"):
        planned(file, "model.tokenizer=nowhere/at/all")
