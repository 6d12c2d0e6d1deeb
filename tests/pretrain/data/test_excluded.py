"""What is left out after a rollback: the batch of a step stays a closed form, the state stays small."""

import json
import random

import pytest

from pretrain.config import ConfigError
from pretrain.data.excluded import STATE_BYTES, Excluded, Sample


def test_steps_pass_over_excluded_batches():
    rng = random.Random(0)
    for _ in range(50):
        out, left = Excluded(), list(range(400))  # slow: the list of batches, with what is excluded taken out
        for _ in range(rng.randint(0, 6)):
            first = rng.randint(0, 200)
            steps = range(first, first + rng.randint(1, 20))
            out = out.without(steps=steps)
            left = [batch for step, batch in enumerate(left) if step not in steps]
        assert [out.batch_at(step) for step in range(len(left))] == left
        assert Excluded.restore(json.loads(json.dumps(out.state()))) == out
        assert all(a[1] < b[0] for a, b in zip(out.batches, out.batches[1:]))


def test_far_away():
    out = Excluded().without(steps=range(10**9, 10**9 + 5)).without(steps=[10**9 + 2])
    assert out.batches == ((10**9, 10**9 + 5), (10**9 + 7, 10**9 + 8))
    assert [out.batch_at(step) - 10**9 for step in (10**9 - 1, 10**9, 10**9 + 1, 10**9 + 2)] == [-1, 5, 6, 8]


def test_state_is_small_and_readable():
    assert Excluded().state() == {}
    out = Excluded().without(samples=[Sample(0, "b.tar", "7"), Sample(0, "a.tar", "3")]).without(steps=[4])
    assert out.state() == {"excluded_batches": [[4, 5]], "excluded_samples": [[0, "a.tar", "3"], [0, "b.tar", "7"]]}
    out = Excluded()
    with pytest.raises(ConfigError, match=r"the run does not recover: lower optim.lr"):
        for step in range(0, 10**6, 2):
            out = out.without(steps=[step])
            assert len(json.dumps(out.state())) <= STATE_BYTES
    assert len(out.batches) > 500
