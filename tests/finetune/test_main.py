"""Fine-tuning on several ranks: every ZeRO stage, resume, one rank or two, the real launcher."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import main
from launcher import world
from pretrain import config, dist, pretrained
from pretrain.engine import checkpoint
from pretrain.engine.parts import Identity
from pretrain.report import scores
from tests import tiny
from tests.ranks import a_port

ROOT = Path(__file__).resolve().parent.parent.parent


def recipe_file(folder: Path, *, method: str = "{name: coop, length: 4}", name: str = "run") -> Path:
    export, data = tiny.export(folder / "export"), tiny.class_folders(folder / "mine")
    path = folder / f"{name}.yaml"
    path.write_text(f"""
base: {export}
run: {{name: {name}, dir: {folder}/runs}}
method: {method}
task: {{name: few_shot, data: {data}, shots: 4, batch_size: 4}}
data: {{workers: 0}}
train: {{steps: 6, batch_size: 4}}
optim: {{optimizer: sgd, lr: 0.05, weight_decay: 5.0e-4, schedule: epoch_cosine, grad_clip: 0}}
checkpoint: {{every_steps: 3, keep_last: 5}}
monitor: {{log_every: 1, tensorboard: false}}
""")
    return path


def fine_tune(file: str, *words: str) -> tuple[int, bool]:
    """Run the stage on this rank; return the exit code and whether the frozen base is what it was."""
    import deepspeed

    jobs: list[main.Job] = []
    build = main.Job.__init__

    def keep(job: main.Job, *args: object) -> None:
        build(job, *args)
        jobs.append(job)

    main.Job.__init__ = keep
    try:
        code = main.run(config.load(main.Recipe, file, words), torch.device("cpu"))
    finally:
        main.Job.__init__ = build
    [job] = jobs
    frozen = list(job.base.model.parameters())
    with deepspeed.zero.GatheredParameters(frozen, enabled=job.recipe.zero.stage == 3):
        base = {n.replace(".inner.", "."): x for n, x in job.base.model.state_dict().items() if "lora_" not in n}
        return code, pretrained.hash_of(base) == job.base.weights_hash


def delta(folder: Path, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "delta.safetensors")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("one")
    assert ranks.run(1, fine_tune, str(recipe_file(folder)), "zero.stage=0") == [(0, True)]
    return delta(folder), scores.newest(folder / "runs" / "run")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_two_ranks_trains_what_one_rank_does(stage, tmp_path, ranks, one_rank):
    found = ranks.run(2, fine_tune, str(recipe_file(tmp_path)), f"zero.stage={stage}")
    assert found == [(0, True), (0, True)]
    want, its_scores = one_rank
    got = delta(tmp_path)
    assert set(got) == set(want) == {"context.words"}
    torch.testing.assert_close(got["context.words"], want["context.words"], rtol=0, atol=2e-5)
    assert scores.newest(tmp_path / "runs" / "run") == its_scores


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_ends_as_an_uninterrupted_one(stage, tmp_path, ranks):
    file = str(recipe_file(tmp_path))
    assert ranks.run(2, fine_tune, file, f"zero.stage={stage}", "data.augment={flip: 0.5}") == [(0, True)] * 2
    want, checkpoints = delta(tmp_path)["context.words"], tmp_path / "runs" / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    (tmp_path / "runs" / "run" / "delta.safetensors").unlink()
    assert ranks.run(2, fine_tune, file, f"zero.stage={stage}", "data.augment={flip: 0.5}") == [(0, True)] * 2
    assert torch.equal(delta(tmp_path)["context.words"], want)  # momentum and schedule went on where they were
    size = sum(part.stat().st_size for part in (checkpoints / "step-00000006").glob("part-*"))
    assert size < 10_000, "a checkpoint of 4 x 32 words has nothing of the frozen base"


def test_a_checkpoint_belongs_to_what_it_was_trained_on(tmp_path):
    """Another draw, or other pictures, are as many samples of the same classes in shards of the same names."""

    def identity(*words: str) -> Identity:
        job = main.Job(config.load(main.Recipe, recipe_file(tmp_path), words), torch.device("cpu"))
        return job.identity(job.training())

    first, moved = identity(), shutil.copytree(tiny.class_folders(tmp_path / "mine"), tmp_path / "moved")
    assert identity(f"task.data={moved}", "task.templates=plain") == first
    assert identity("task.seed=2") != first
    for path in (moved / "train").glob("*/*"):
        path.write_bytes(path.read_bytes() + bytes(9))
    assert identity(f"task.data={moved}", "run.name=other") != first


METHODS_OF_TOWERS = {
    "lora": "{name: lora, roles: [q, v, up], dropout: 0.0}",
    "full": "{name: full, towers: both, wise: 0.5}",
}
PLAIN = ("optim.optimizer=adamw", "optim.lr=1.0e-4", "optim.eps=1.0e-3", "optim.schedule=constant")


@pytest.mark.check("full", 7)
@pytest.mark.check("lora", 10)
@pytest.mark.parametrize(("name", "stage"), [("lora", 1), ("full", 2), pytest.param("full", 3, marks=pytest.mark.slow)])
def test_micro_batches_train_as_whole_ones(name, stage, tmp_path, ranks):
    for run, more in (("whole", ()), ("parts", ("train.micro_batch_size=1",))):
        file = str(recipe_file(tmp_path, method=METHODS_OF_TOWERS[name], name=run))
        words = (*PLAIN, f"zero.stage={stage}", *more)
        assert {code for code, _ in ranks.run(2, fine_tune, file, *words)} == {0}
    want, got = delta(tmp_path, "whole"), delta(tmp_path, "parts")
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-6)
    assert scores.newest(tmp_path / "runs" / "parts") == scores.newest(tmp_path / "runs" / "whole")


@pytest.mark.slow
@pytest.mark.check("full", 7)
def test_micro_batches_of_pairs_are_compared_with_the_whole_batch(tmp_path, ranks):
    for run, more in (("whole", ()), ("parts", ("train.micro_batch_size=1",))):
        path = recipe_file(tmp_path, method=METHODS_OF_TOWERS["full"], name=run)
        task = f"task: {{name: retrieval, data: {tiny.pairs(tmp_path / 'pairs')}, batch_size: 4}}"
        path.write_text(re.sub("task: {.*}", task, path.read_text()))
        assert {code for code, _ in ranks.run(2, fine_tune, str(path), *PLAIN, "zero.stage=2", *more)} == {0}
    want, got = delta(tmp_path, "whole"), delta(tmp_path, "parts")
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=2e-6)


@pytest.mark.check("full", 8)
@pytest.mark.check("lora", 11)
@pytest.mark.parametrize(("name", "stage"), [("full", 0), ("lora", 1), pytest.param("full", 3, marks=pytest.mark.slow)])
def test_an_average_is_what_the_delta_holds(name, stage, tmp_path, ranks):
    file = str(recipe_file(tmp_path, method=METHODS_OF_TOWERS[name]))
    words = ("ema.decay=0.8", "checkpoint.every_steps=1", "checkpoint.keep_last=9", f"zero.stage={stage}")
    assert {code for code, _ in ranks.run(2, fine_tune, file, *PLAIN, *words)} == {0}
    saved = [tmp_path / "runs" / "run" / "checkpoints" / f"step-{step:08d}" for step in range(1, 7)]
    by_hand = {n: x for n, x in checkpoint.read_weights(saved[0], average=True).items() if "method." in n}
    for step, folder in enumerate(saved[1:], 2):
        for key, value in checkpoint.read_weights(folder).items():
            if key in by_hand:
                by_hand[key] = by_hand[key].lerp(value, 1 - min(0.8, (1 + step) / (10 + step)))
    got = delta(tmp_path)
    for key, value in got.items():
        torch.testing.assert_close(value, by_hand[f"method.{key}"], rtol=0, atol=1e-6)
    last = checkpoint.read_weights(saved[-1])
    assert any((value - last[f"method.{key}"]).abs().max() > 1e-6 for key, value in got.items())


@pytest.mark.check("full", 8)
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_an_average_is_what_is_scored(stage, tmp_path, ranks):
    """One that never leaves the base scores as the base does, whatever training made of the weights."""
    file = str(recipe_file(tmp_path, method="{name: full, towers: both}"))
    spoilt = ("optim.lr=0.3", "task.templates=['a photo of a {}.']", f"zero.stage={stage}")
    for words in ((), ("ema={decay: 0.9999999, warmup: false}",)):
        name = f"run.name=with{len(words)}"
        assert {code for code, _ in ranks.run(2, fine_tune, file, name, *spoilt, *words)} == {0}
    found = scores.newest(tmp_path / "runs" / "with1")
    (_, now), (_, then) = found["few_shot/accuracy"], found["few_shot/zero_shot"]
    assert now == then
    start = dict(pretrained.load(tmp_path / "export").model.named_parameters())
    for key, value in delta(tmp_path, "with1").items():
        torch.testing.assert_close(value, start[key.removeprefix("model.")], rtol=0, atol=1e-4)
    moved = delta(tmp_path, "with0")
    assert max(float((x - start[n.removeprefix("model.")].detach()).abs().max()) for n, x in moved.items()) > 1e-2


@pytest.mark.check("linear-probe", 6)
def test_the_probe_is_the_same_on_two_ranks(tmp_path, ranks):
    file = str(recipe_file(tmp_path, method="{name: linear_probe, c: 1.0}"))
    assert ranks.run(1, fine_tune, file) == [(0, True)]
    one, its_scores = delta(tmp_path), scores.newest(tmp_path / "runs" / "run")
    assert ranks.run(2, fine_tune, file) == [(0, True)] * 2
    two = delta(tmp_path)
    assert set(one) == {"head.weight", "head.bias"}
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
    assert scores.newest(tmp_path / "runs" / "run") == its_scores


METHODS = {
    "coop": "{name: coop, length: 4, chunk: 2}",
    "cocoop": "{name: cocoop, chunk: 2}",
    "clip_adapter": "{name: clip_adapter, towers: both}",
    "tip_adapter": "{name: tip_adapter, train_keys: true, views: 2, betas: 3, alphas: 3}",
    "lora": "{name: lora, roles: [q, v, out, down], dropout: 0.0}",
    "full": "{name: full, towers: both, wise: 0.5}",
    "full_linear": "{name: full, head: linear}",
}


@pytest.mark.check("lora", 5)
@pytest.mark.check("few-shot", 6)
@pytest.mark.slow
@pytest.mark.check("coop", 11)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_at_every_stage_is_one_rank(name, tmp_path, ranks):
    more = [f"task.data={tiny.class_folders(tmp_path / 'enough', train=9)}", "data.augment={flip: 0.5}"]
    if name.startswith("full"):
        more += ["optim.lr=0.002", "optim.layer_decay={vision: 0.5}"]
    untouched = not name.startswith("full")
    found = ranks.run(1, fine_tune, str(recipe_file(tmp_path, method=METHODS[name])), "zero.stage=0", *more)
    assert found == [(0, untouched)]
    want, want_scores = delta(tmp_path), scores.newest(tmp_path / "runs" / "run")
    for stage in range(4):
        file = str(recipe_file(tmp_path, method=METHODS[name], name=f"stage{stage}"))
        assert ranks.run(2, fine_tune, file, f"zero.stage={stage}", *more, timeout=600) == [(0, untouched)] * 2
        got = delta(tmp_path, f"stage{stage}")
        assert set(got) == set(want) and all(torch.isfinite(x).all() for x in got.values())
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5)
        assert scores.newest(tmp_path / "runs" / f"stage{stage}") == want_scores


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_trained_keys_resume(stage, tmp_path, ranks):
    more = [f"task.data={tiny.class_folders(tmp_path / 'enough', train=9)}", f"zero.stage={stage}"]
    file = str(recipe_file(tmp_path, method=METHODS["tip_adapter"]))
    assert ranks.run(2, fine_tune, file, *more) == [(0, True)] * 2
    want, checkpoints = delta(tmp_path), tmp_path / "runs" / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    assert ranks.run(2, fine_tune, file, *more) == [(0, True)] * 2
    assert all(torch.equal(x, want[name]) for name, x in delta(tmp_path).items())


def launch(*words: str, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**world.outside(os.environ), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "finetune/main.py", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_the_deepspeed_launcher(tmp_path, one_rank):
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", a_port()]
    done = launch("--config", str(recipe_file(tmp_path)), "zero.stage=1", launcher=deepspeed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"coop on few_shot \(3 classes, 12 samples, 128 parameters\): test accuracy .* %", done.stdout)
    torch.testing.assert_close(delta(tmp_path)["context.words"], one_rank[0]["context.words"], rtol=0, atol=2e-5)


def test_bad_usage_is_a_sentence_and_2(tmp_path):
    file = str(recipe_file(tmp_path))
    done = launch("--config", file, f"base={tmp_path}/nowhere", launcher=[sys.executable])
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "a refused start leaves nothing behind"


def test_help_shows_an_example():
    done = launch("--help", launcher=[sys.executable])
    assert done.returncode == 0 and "deepspeed" in done.stdout and "task.data=FOLDER" in done.stdout
    assert dist.world() == 1
