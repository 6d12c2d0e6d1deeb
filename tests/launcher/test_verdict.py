"""What exit codes mean, and when a run must not be started again."""

import pytest

from launcher import verdict
from launcher.run_folder import Progress
from launcher.verdict import Policy
from pretrain.engine import preemption


def test_the_codes_are_those_of_the_run() -> None:
    assert verdict.EXIT_REQUEUE == preemption.EXIT_REQUEUE
    assert verdict.EXIT_INTERRUPTED == preemption.EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("code", "asked", "saved", "judged"),
    [
        (0, 0, False, "done"),
        (0, 15, False, "done"),
        (2, 0, False, "mistake"),
        (2, 15, False, "mistake"),
        (85, 0, False, "again"),
        (85, 10, True, "stopped"),
        (1, 0, False, "crashed"),
        (1, 0, True, "again"),  # torchrun, one of whose ranks was signalled
        (1, 15, True, "stopped"),
        (137, 0, False, "crashed"),
        (143, 15, False, "stopped"),  # before the run had installed its handlers
        (130, 0, True, "interrupted"),
        (1, 2, True, "interrupted"),
    ],
)
def test_judge(code: int, asked: int, saved: bool, judged: str) -> None:
    assert verdict.judge(code, asked=asked, saved_on_signal=saved) == judged


def test_a_zero_of_a_run_that_is_not_at_its_end_is_no_end() -> None:
    assert verdict.judge(0, progress=Progress(7, 10, 5, False)) == "crashed"
    assert verdict.judge(0, progress=Progress(10, 10, 10, True)) == "done"
    assert verdict.judge(0, progress=Progress(0, 0, -1, False)) == "done"


def end(step: int, saved: int, judged: str = "crashed") -> dict:
    return {"event": "end", "step": step, "saved": saved, "verdict": judged}


def test_a_crash_loop_is_told_from_bad_luck() -> None:
    policy = Policy(same_step=3, no_progress=5)
    assert not verdict.loop([], policy)
    assert not verdict.loop([end(7, 5), end(7, 5)], policy)
    assert "3 times at step 7" in verdict.loop([end(7, 5)] * 3, policy)
    assert not verdict.loop([end(7, 5), end(12, 10), end(17, 15)] * 4, policy)  # it always comes further
    assert "5 times without a checkpoint after step 5" in verdict.loop([end(n, 5) for n in range(6, 11)], policy)
    assert not verdict.loop([*(end(n, 5) for n in range(6, 10)), end(11, 10)], policy)


def test_pauses_grow_to_a_limit() -> None:
    policy = Policy(first_wait=10, longest_wait=60)
    assert [policy.wait(n) for n in (0, 1, 2, 3, 9)] == [10, 10, 20, 40, 60]


def test_only_failures_since_a_person_started_it_count() -> None:
    by_hand, by_queue = {"event": "start", "by_hand": True}, {"event": "start", "by_hand": False}
    assert verdict.failures([by_hand, end(1, 0), by_hand, end(2, 0), by_queue]) == [end(2, 0)]
    assert verdict.failures([by_hand, end(1, 0), by_queue, end(3, 0, "stopped"), by_queue, end(4, 0)]) == [
        end(1, 0),
        end(4, 0),
    ]
