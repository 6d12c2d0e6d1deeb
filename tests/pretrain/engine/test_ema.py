"""The sharded average equals the naive one of whole weights, at every stage, in evals, and after any resume."""

import pytest
import torch

from pretrain import dist
from pretrain.config import ConfigError, build
from pretrain.engine import checkpoint, ema, zero
from pretrain.engine.checkpoint import Checkpoints
from tests.pretrain.engine.test_checkpoint import AT_ONCE, PRINT, claimed, state
from tests.pretrain.engine.test_zero import engine, train

SECTION = ema.Config(decay=0.9)


def test_golden_decays():
    average = ema.Average(ema.Config(decay=0.99), [])
    assert [round(average.decay(t), 6) for t in (1, 2, 100, 2000)] == [0.181818, 0.25, 0.918182, 0.99]
    assert ema.Average(ema.Config(decay=0.99, warmup=False), []).decay(1) == 0.99
    every = ema.Average(ema.Config(decay=0.99, every=10), [])
    assert every.decay(10) == 2 / 11 and every.decay(10**6) == 0.99**10


def test_every_third_update_counts_and_exchanging_twice_changes_nothing():
    master = torch.tensor([1.0, 2.0])
    average = ema.Average(ema.Config(decay=0.5, every=3, warmup=False), [master])
    master += 8
    for updates in (1, 2):
        average.update([master], updates)
    assert average.part(master).tolist() == [1, 2]
    average.update([master], 3)
    assert average.part(master).tolist() == [8, 9]  # 1 + (1 - 0.5 ** 3) * 8
    average.exchange([master])
    assert master.tolist() == [8, 9] and average.part(master).tolist() == [9, 10]
    average.exchange([master])
    assert master.tolist() == [9, 10] and average.part(master).tolist() == [8, 9]


def test_a_decay_of_one_is_refused():
    with pytest.raises(ConfigError, match="decay"):
        build(ema.Config, {"decay": 1.0})


def whole(made: zero.Engine, kind: str) -> dict[str, torch.Tensor]:
    """Return whole flat parameters, put together from the parts of all ranks."""
    parts = [
        (f.name, f.start, (f.weight if kind == "weight" else f.moments[kind]).clone())
        for f in made.fragments()
        if kind == "weight" or f.moments
    ]
    out: dict[str, dict[int, torch.Tensor]] = {}
    for rank_parts in dist.gather_objects(parts):
        for name, start, values in rank_parts:
            out.setdefault(name, {})[start] = values
    return {name: torch.cat([pieces[s] for s in sorted(pieces)]) for name, pieces in out.items()}


def compare(stage: int) -> None:
    """Run on every rank: train, average by hand, compare to the bit; evals see the average, training does not."""
    made = engine(stage, average=SECTION)
    try:
        by_hand = whole(made, "weight")
        for step in range(4):
            train(made, step, step + 1)
            for name, weight in whole(made, "weight").items():
                by_hand[name].lerp_(weight, 1 - min(0.9, (2 + step) / (11 + step)))
        found = whole(made, "ema")
        assert found.keys() == by_hand.keys() - {"frozen.weight"}
        assert all(torch.equal(found[name], by_hand[name]) for name in found)
        before = whole(made, "weight")
        assert not torch.equal(before["first.weight"], found["first.weight"])
        x_BF = torch.ones(2, 7)
        with made.evaluating() as module:
            seen = module.features(x_BF)
            hidden = torch.tanh(
                torch.nn.functional.layer_norm(
                    x_BF @ found["first.weight"].view(11, 7).T + found["first.bias"],
                    (11,),
                    found["norm.weight"],
                    found["norm.bias"],
                )
            )
            out = hidden @ by_hand["frozen.weight"].view(11, 11).T @ found["last.weight"].view(3, 11).T
            torch.testing.assert_close(seen, (out + found["last.bias"]) * found["scale"])
        after = whole(made, "weight")
        assert all(torch.equal(before[name], after[name]) for name in before)
        after = whole(made, "ema")
        assert all(torch.equal(found[name], after[name]) for name in found)
    finally:
        made.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_average_in_parts_is_the_average_of_the_whole(ranks, stage):
    ranks.run(2, compare, stage)


def save_and_go_on(root: str, stage: int, *, average: bool) -> list[float]:
    made, folder = engine(stage, average=SECTION if average else None), claimed(root)
    try:
        saver = Checkpoints(folder, AT_ONCE)
        train(made, 0, 2)
        saver.save(made, state(2))
        train(made, 2, 5, evaluate=True)
        saver.save(made, state(5))
        return []
    finally:
        made.close()


def resume(root: str, stage: int, out: str, first: int = 2) -> None:
    made, folder = engine(stage, seed=1, average=SECTION), claimed(out)
    try:
        source = build(checkpoint.Config, {"resume": f"{root}/checkpoints/step-{first:08d}"})
        Checkpoints(folder, source).restore(made, fingerprint=PRINT)
        train(made, first, 5)
        Checkpoints(folder, AT_ONCE).save(made, state(5))
    finally:
        made.close()


def last(folder) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(folder / "checkpoints/step-00000005", average=True)


@pytest.mark.parametrize(
    ("before", "after", "exact"), [((1, 2), (1, 2), True), ((1, 2), (3, 1), False), ((3, 2), (0, 1), False)]
)
def test_an_average_goes_on_after_a_resume(ranks, tmp_path, before, after, exact):
    ranks.run(before[1], save_and_go_on, str(tmp_path / "a"), before[0], average=True)
    ranks.run(after[1], resume, str(tmp_path / "a"), after[0], str(tmp_path / "b"))
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    raw = checkpoint.read_weights(tmp_path / "a/checkpoints/step-00000005")
    assert not torch.equal(a["first.weight"], raw["first.weight"])
    assert torch.equal(a["frozen.weight"], raw["frozen.weight"]) and torch.equal(a["seen"], raw["seen"])
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_average_of_a_run_without_one_starts_from_its_weights(ranks, tmp_path):
    ranks.run(2, save_and_go_on, str(tmp_path / "a"), 1, average=False)
    ranks.run(1, resume, str(tmp_path / "a"), 3, str(tmp_path / "b"), first=5)
    plain = checkpoint.read_weights(tmp_path / "a/checkpoints/step-00000005")
    assert all(torch.equal(value, plain[name]) for name, value in last(tmp_path / "a").items())
    assert all(torch.equal(value, plain[name]) for name, value in last(tmp_path / "b").items())
