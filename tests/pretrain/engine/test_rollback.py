"""Trouble in training: a batch is left out, the run goes back, or it ends; and it ends with the bits that it should."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.engine import checkpoint, journal, rollback
from pretrain.engine.rollback import Config, Faults
from pretrain.engine.run_folder import RunFolder
from tests.pretrain.engine import tiny_run


def final(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(folder / f"checkpoints/step-{step:08d}")


def same_end(a: Path, b: Path) -> None:
    left, right = final(a), final(b)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert [line["loss"] for line in lines(a, "metrics")] == [line["loss"] for line in lines(b, "metrics")]


def lines(folder: Path, name: str = "faults") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_batch_that_turns_to_nan_is_as_if_it_had_never_been(ranks, tmp_path, stage):
    stage = f"zero.stage={stage}"
    told, found = tmp_path / "told", tmp_path / "found"
    ranks.run(2, tiny_run.run, str(told), stage, "faults.leave_out=[4]")
    ranks.run(2, tiny_run.run, str(found), stage, "nan_at=[4]")
    same_end(told, found)
    [line] = lines(found)
    assert (line["step"], line["what"], line["left_out"], line["ranks"], line["back_to"]) == (5, "loss", [4], [1], None)
    assert line["keys"] == ["4-1-0", "4-1-1", "4-1-2", "4-1-3"]
    assert "step 5: the loss is not finite on 1 of 2 ranks; batch 4 is left out" in (found / "log.txt").read_text()
    assert not (told / "faults.jsonl").exists()


@pytest.mark.parametrize("stop", ["kill_at=6", "signal_at=4"])
def test_it_stays_left_out_after_a_kill(ranks, tmp_path, stop):
    told, found = tmp_path / "told", tmp_path / "found"
    ranks.run(2, tiny_run.run, str(told), "faults.leave_out=[4]")
    if stop.startswith("kill"):
        with pytest.raises(AssertionError, match="died with -9"):
            ranks.run(2, tiny_run.run, str(found), "nan_at=[4]", stop)
    else:  # the signal comes in the very batch
        assert ranks.run(2, tiny_run.run, str(found), "nan_at=[4]", stop)[0][0] == 85
    ranks.run(2, tiny_run.run, str(found), "seed=1")  # was it a fault of the machine? it is left out all the same
    same_end(told, found)
    assert len(lines(found)) == 1


def test_several_in_a_row_send_the_run_back(ranks, tmp_path):
    told, found = tmp_path / "told", tmp_path / "found"
    words = ["faults.skips=1", "faults.back=1", "checkpoint.every_steps=2"]
    ranks.run(2, tiny_run.run, str(told), "faults.leave_out=[3,4,5]")
    results = ranks.run(2, tiny_run.run, str(found), "nan_at=[4,5]", *words)
    assert ("restored", 2) in results[0][1]
    same_end(told, found)
    assert [(line["left_out"], line["back_to"]) for line in lines(found)] == [([4], None), ([3, 5], 2)]
    assert (found / "checkpoints/latest").read_text() == "step-00000008\n"


def test_a_kill_after_going_back_goes_on_from_there(ranks, tmp_path):
    told, found = tmp_path / "told", tmp_path / "found"
    words = ["faults.skips=0", "faults.back=1", "checkpoint.every_steps=2"]
    ranks.run(2, tiny_run.run, str(told), "faults.leave_out=[3,4]")
    with pytest.raises(AssertionError, match="died with -9"):
        ranks.run(2, tiny_run.run, str(found), "nan_at=[4]", "kill_at=5", *words)
    assert (found / "checkpoints/latest").read_text() == "step-00000002\n"
    ranks.run(2, tiny_run.run, str(found), *words)
    same_end(told, found)


def test_a_spike_sends_the_run_back(ranks, tmp_path):
    told, found = tmp_path / "told", tmp_path / "found"
    words = ["faults.spike=1000", "faults.window=8", "faults.back=0", "train.steps=12", "checkpoint.every_steps=5"]
    ranks.run(2, tiny_run.run, str(told), "faults.leave_out=[9]", "train.steps=12")
    ranks.run(2, tiny_run.run, str(found), "huge_at=9", *words)
    [line] = lines(found)
    assert (line["what"], line["left_out"], line["back_to"]) == ("spike", [9], 5)
    assert "the median of 8 steps" in line["why"]
    left, right = final(told, 12), final(found, 12)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_that_does_not_recover_ends_with_a_sentence(ranks, tmp_path):
    nan = f"nan_at={list(range(5, 40))}"
    words = ["faults.skips=1", "faults.back=1", "faults.rollbacks=2", "checkpoint.every_steps=2"]
    with pytest.raises(AssertionError) as error:
        ranks.run(2, tiny_run.run, str(tmp_path), nan, *words)
    sentence = "TrainingError: step 4: the loss is not finite on 1 of 2 ranks; the run has gone back 2 times"
    assert str(error.value).count(sentence) == 2
    assert final(tmp_path, 2)
    with pytest.raises(AssertionError, match="2 in a row, and there is no checkpoint to go back to"):
        ranks.run(2, tiny_run.run, str(tmp_path / "early"), "nan_at=[0,1,2,3]", *words)


def infinite_gradient(folder: str, *words: str) -> tuple:
    """The gradient of batch 4 is infinite, its loss is not."""

    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    from tests.pretrain.engine import tiny_module

    forward = tiny_module.Tiny.forward

    def blown(self, batches):
        loss, logs = forward(self, batches)
        return (Blow.apply(loss) if batches[0].keys[0].startswith("4-") else loss), logs

    tiny_module.Tiny.forward = blown
    try:
        return tiny_run.run(folder, *words)
    finally:
        tiny_module.Tiny.forward = forward


@pytest.mark.parametrize("stage", [0, 2])
def test_an_infinite_gradient_is_a_batch_to_leave_out(ranks, tmp_path, stage):
    told, found = tmp_path / "told", tmp_path / "found"
    ranks.run(2, tiny_run.run, str(told), f"zero.stage={stage}", "faults.leave_out=[4]")
    ranks.run(2, infinite_gradient, str(found), f"zero.stage={stage}")
    same_end(told, found)
    assert lines(found)[0]["what"] == "gradient"


def judged(tmp_path: Path, **config: object) -> Faults:
    return Faults(Config(**config), RunFolder(tmp_path), fresh=False)


def test_a_spike_is_judged_by_the_window(tmp_path):
    faults = judged(tmp_path, spike=6, window=8)
    wave = [2.0, 2.1, 1.9, 2.05]
    for _ in range(3):
        for loss in wave:
            assert faults.judge(loss, broken=0, norm=1.0, scaled=False) is None
    assert faults.judge(2.3, broken=0, norm=1.0, scaled=False) is None
    trouble = faults.judge(4.0, broken=0, norm=1.0, scaled=False)
    assert trouble is not None and trouble.kind == "spike" and not faults.may_skip(trouble)
    again = judged(tmp_path, spike=6, window=8)
    again.restore(json.loads(json.dumps(faults.state())))
    assert again.judge(4.0, broken=0, norm=1.0, scaled=False) == trouble
    assert judged(tmp_path).judge(1e9, broken=0, norm=1.0, scaled=False) is None


def test_the_checkpoint_to_go_back_to():
    found = [Path(f"step-{step:08d}") for step in (30, 20, 10)]
    assert rollback.choose(found, 31, 8) == found[1]
    assert rollback.choose(found, 30, 0) == found[1]
    assert rollback.choose(found, 12, 8) == found[2]
    assert rollback.choose(found, 10, 8) is None


def mine() -> None:
    """Nobody else has the folder."""


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "faults.jsonl"
    journal.append(path, {"left_out": [3], "back_to": None}, check=mine)
    with open(path, "a") as file:
        file.write('{"left_out": [4')
    assert [line["left_out"] for line in journal.read(path)] == [[3]]
    journal.append(path, {"left_out": [5], "back_to": 2}, check=mine)
    faults = judged(tmp_path, leave_out=[9])
    assert faults.left_out == {3, 5} and faults.rollbacks == 1 and faults.wanted(4) == [5, 9]
