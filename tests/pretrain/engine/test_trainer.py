"""Whole runs: stages and worlds agree, kills and resumes change nothing, trouble stops all ranks with a sentence."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from pretrain.config import ConfigError, build
from pretrain.engine import checkpoint, steps
from pretrain.engine.preemption import EXIT_REQUEUE
from tests import trouble
from tests.pretrain.engine import tiny_run
from tests.ranks import a_port

SCRIPT = Path(tiny_run.__file__)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in metrics(folder)]


def final(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(folder / f"checkpoints/step-{step:08d}")


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks at stage 1."""
    folder = tmp_path_factory.mktemp("whole")
    assert ranks.run(2, tiny_run.run, str(folder)) == [(0, [("hook", 4, False), ("hook", 8, False)])] * 2
    return folder


def test_a_run_leaves_what_the_design_says(whole):
    lines = metrics(whole)
    assert [m["step"] for m in lines] == list(range(1, 9))
    keys = {"samples", "loss", "scale", "lr", "samples_per_s", "samples_per_s_per_device", "data_wait", "step_time"}
    assert keys | {"memory", "grad_norm"} <= lines[0].keys()
    assert lines[-1]["samples"] == 64 and lines[0]["lr"] == 0.01 and lines[1]["lr"] == 0.02
    assert "step 8/8" in (whole / "log.txt").read_text()
    assert json.loads((whole / "environment.json").read_text())["world"] == 2
    assert (whole / "config.yaml").read_text() == "seed: 0\n"
    assert (whole / "checkpoints/latest").read_text() == "step-00000008\n"


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_stages_and_worlds_agree(ranks, tmp_path, whole, world, stage):
    ranks.run(world, tiny_run.run, str(tmp_path), f"zero.stage={stage}")
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_a_killed_run_ends_with_the_same_bits(ranks, tmp_path, whole):
    with pytest.raises(AssertionError, match="died with -9"):
        ranks.run(2, tiny_run.run, str(tmp_path), "kill_at=5")
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]  # beyond the checkpoint of step 3
    results = ranks.run(2, tiny_run.run, str(tmp_path), "seed=1")
    assert results[0] == (0, [("restored", 3), ("hook", 4, False), ("hook", 8, False)])
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 9))
    assert losses(tmp_path) == losses(whole)
    a, b = final(tmp_path), final(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_resume_on_another_world_goes_on(ranks, tmp_path, whole):
    ranks.run(2, tiny_run.run, str(tmp_path), "train.steps=8", "checkpoint.every_steps=4")
    for late in ("step-00000008", "latest"):
        path = tmp_path / "checkpoints" / late
        subprocess.run(["rm", "-r", str(path)], check=True)
    ranks.run(1, tiny_run.run, str(tmp_path), "zero.stage=3", "seed=1")
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_a_refused_start_leaves_the_folder_alone(ranks, tmp_path):
    ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=3")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(AssertionError, match=r"ConfigError: resume: order.seed was 0 in .* is 5 now"):
        ranks.run(1, tiny_run.run, str(tmp_path), "order=5")
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_a_run_longer_than_asked_is_left_as_it_is(ranks, tmp_path):
    ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=4")
    assert ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=3") == [(0, [("restored", 4)])]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000004\n"


def held_save(folder: str) -> tuple:
    """The disk takes no byte of the first save before step 7 has come, which it could not if training waited."""
    from tests.pretrain.engine import tiny_module

    batch = tiny_module.batch
    release = Path(folder).with_name("release")

    def made(step: int, *args: int) -> object:
        if step == 6:
            assert not checkpoint.complete(Path(folder) / "checkpoints")
            release.touch()
        return batch(step, *args)

    with mock.patch.object(tiny_module, "batch", made), trouble.held_disk(release):
        return tiny_run.run(folder, "checkpoint.every_steps=4")


def test_training_goes_on_while_a_checkpoint_is_written(ranks, tmp_path, whole):
    held = tmp_path / "held"
    ranks.run(2, held_save, str(held))
    assert [checkpoint.step_of(path) for path in checkpoint.complete(held / "checkpoints")] == [8, 4]
    assert "step-00000004: complete after" in (held / "log.txt").read_text()
    a, b = final(held), final(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


def full_saves(folder: str) -> tuple:
    """Writes of checkpoints find no space; the rest of the run folder still takes some bytes."""
    with trouble.full_disk():
        return tiny_run.run(folder, "train.steps=12")


def test_a_disk_that_is_full_is_said_and_the_older_checkpoint_loads(ranks, tmp_path):
    ranks.run(2, tiny_run.run, str(tmp_path), "train.steps=5")
    with pytest.raises(
        AssertionError, match=r"CheckpointError: checkpoint .*step-\d+ was not written: rank 0: .*No space"
    ):
        ranks.run(2, full_saves, str(tmp_path))
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert final(tmp_path, 5)
    assert ranks.run(2, tiny_run.run, str(tmp_path), "train.steps=8")[0][0] == 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_process_that_wakes_up_after_a_newer_start_writes_nothing(ranks, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, launcher=False)
    try:
        wait_for_steps(folder, process, 5)
        process.send_signal(signal.SIGSTOP)
        assert ranks.run(1, tiny_run.run, str(folder), "train.steps=400")[0][0] == 0
        before = tree(folder)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "a newer start of this run has taken over the folder" in output, output
    assert tree(folder) == before


def test_a_save_by_the_clock(ranks, tmp_path):
    words = ["checkpoint.every_steps=null", "checkpoint.every_minutes=0.001", "pause=0.05", "checkpoint.keep_last=9"]
    ranks.run(2, tiny_run.run, str(tmp_path), *words)
    assert 1 < len(checkpoint.complete(tmp_path / "checkpoints")) < 8


def signal_at(folder: str, step: int) -> tuple:
    """Rank 1 gets a real SIGTERM in the middle of a step."""
    return tiny_run.run(folder, f"signal_at={step}")


def test_hooks_that_a_signal_skipped_are_called_by_the_next_start(ranks, tmp_path, whole):
    assert ranks.run(2, signal_at, str(tmp_path), 3) == [(EXIT_REQUEUE, [])] * 2
    seen = [("restored", 4), ("hook", 4, False), ("hook", 8, False)]
    assert ranks.run(2, tiny_run.run, str(tmp_path), "seed=1") == [(0, seen)] * 2
    assert losses(tmp_path) == losses(whole)


def test_a_finished_run_started_again_does_nothing(ranks, tmp_path, whole):
    ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=3")
    before = losses(tmp_path)
    assert ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=3") == [(0, [("restored", 3)])]
    assert losses(tmp_path) == before


def test_a_changed_learning_rate_is_told(ranks, tmp_path):
    ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=3")
    ranks.run(1, tiny_run.run, str(tmp_path), "train.steps=4", "optim.lr=0.01")
    assert "WARNING warning: optim.lr was 0.02, is 0.01 from here on" in (tmp_path / "log.txt").read_text()


def test_a_loss_that_is_not_finite_stops_all_ranks(ranks, tmp_path):
    with pytest.raises(AssertionError) as error:
        ranks.run(2, tiny_run.run, str(tmp_path), "nan_at=[4]", "faults.limit=0")
    sentence = "TrainingError: step 5: the loss is not finite on 1 of 2 ranks; 1 batches would be left out, over faults"
    assert str(error.value).count(sentence) == 2
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003\n"


def test_bad_samples_of_one_rank_are_seen_by_all(ranks, tmp_path):
    (_, first), (_, second) = ranks.run(2, tiny_run.run, str(tmp_path), "bad_at=2")
    assert ("bad", 2, 0) in first and ("bad", 2, 1) in second


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(ranks, tmp_path, whole, precision):
    words = [f"train.precision={precision}", "zero.stage=2", "checkpoint.every_steps=4"]
    ranks.run(2, tiny_run.run, str(tmp_path), *words)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=0.05)
    assert losses(tmp_path) != losses(whole)
    before, lines = losses(tmp_path), metrics(tmp_path)
    if precision == "fp16":
        assert {m["loss_scale"] for m in lines} == {2.0**16}
    for late in ("step-00000008", "latest"):
        subprocess.run(["rm", "-r", str(tmp_path / "checkpoints" / late)], check=True)
    ranks.run(2, tiny_run.run, str(tmp_path), *words, "seed=1")
    assert losses(tmp_path) == before


def test_a_batch_that_ranks_do_not_divide_is_refused(ranks, tmp_path):
    with pytest.raises(AssertionError, match=r"train.batch_size: 9 is not divisible by 2 ranks; try 8"):
        ranks.run(2, tiny_run.run, str(tmp_path), "train.batch_size=9")


def test_the_length_of_a_run():
    assert steps.Config(steps=7).total_steps(100) == 7
    assert steps.Config(samples=1000, batch_size=256).total_steps(100) == 4
    assert steps.Config(epochs=1.5, batch_size=10).total_steps(100) == 15
    with pytest.raises(ConfigError, match="exactly one of steps, samples, epochs"):
        build(steps.Config, {"steps": 1, "epochs": 1})
    with pytest.raises(ConfigError, match="no samples"):
        steps.Config(epochs=1).total_steps(0)


def start(folder: Path, *words: str, launcher: bool) -> subprocess.Popen:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    head = ["deepspeed", "--num_gpus", "2", "--master_port", a_port()] if launcher else [sys.executable]
    command = [*head, str(SCRIPT), str(folder), "train.steps=10000", "pause=0.02", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(folder: Path, process: subprocess.Popen, steps: int = 3) -> None:
    for _ in range(3000):  # a busy machine takes a minute for imports alone
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("no step in five minutes")


def test_a_signal_to_one_rank_saves_on_all_and_asks_to_be_requeued(tmp_path):
    process = start(tmp_path, launcher=True)
    try:
        wait_for_steps(tmp_path, process)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
        ranks[0].send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_REQUEUE, output
    done = int((tmp_path / "checkpoints/latest").read_text()[5:])
    assert done == metrics(tmp_path)[-1]["step"] and final(tmp_path, done)
    assert f"stopped by a signal after step {done}" in output
    assert not (tmp_path / "extensions").exists(), "the first step must not compile anything"


@pytest.mark.parametrize(("presses", "saved"), [(1, True), (2, False)])
def test_ctrl_c_saves_and_the_second_one_leaves_at_once(tmp_path, presses, saved):
    process = start(tmp_path, "checkpoint.every_steps=null", f"pause={0.02 if saved else 3}", launcher=False)
    try:
        wait_for_steps(tmp_path, process, 3 if saved else 1)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert bool(checkpoint.complete(tmp_path / "checkpoints")) == saved
    assert math.isfinite(losses(tmp_path)[-1])
