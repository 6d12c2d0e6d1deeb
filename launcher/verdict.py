"""What the end of a run means, and when going on has no sense: a crash loop is told from bad luck by what was saved."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

from launcher.run_folder import Progress

# the codes of pretrain/engine/preemption.py; tests/launcher/test_verdict.py compares them
EXIT_REQUEUE = 85
EXIT_INTERRUPTED = 130
EXIT_USAGE = 2  # of every command of ours, and of argparse

DONE = "done"
MISTAKE = "mistake"  #: in the config or the data: it would be the same again
INTERRUPTED = "interrupted"  #: somebody pressed Ctrl-C
STOPPED = "stopped"  #: as this launcher was asked to
AGAIN = "again"  #: saved and wants to be started again, without our asking
CRASHED = "crashed"
FAILURES = (AGAIN, CRASHED)


class Policy(NamedTuple):
    """How often a run may fail."""

    same_step: int = 3  #: failures one after the other that came no step further
    no_progress: int = 5  #: failures one after the other without a newer checkpoint between them
    first_wait: float = 10.0  #: seconds before the second start after a failure; doubled each time
    longest_wait: float = 300.0

    def wait(self, failures: int) -> float:
        """Return how many seconds to wait after so many failures without progress."""
        return min(self.longest_wait, self.first_wait * 2.0 ** max(0, failures - 1))


def judge(code: int, *, asked: int = 0, saved_on_signal: bool = False, progress: Progress | None = None) -> str:
    """Return what an exit code means.

    `asked` is the signal that was passed on to the ranks (0: none); `saved_on_signal` that the newest checkpoint was
    written by ranks that were told to stop, since this start: torchrun and pdsh lose the ranks' own code.
    `progress` is looked at where the code is 0: `deepspeed` leaves with 0 when its own child was killed.
    """
    if code == 0:
        unfinished = progress is not None and 0 <= progress.saved < progress.steps
        return (STOPPED if asked else CRASHED) if unfinished else DONE
    if code == EXIT_USAGE:
        return MISTAKE
    if asked == 2 or code == EXIT_INTERRUPTED:
        return INTERRUPTED
    if asked:
        return STOPPED
    return AGAIN if code == EXIT_REQUEUE or saved_on_signal else CRASHED


def failures(record: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ends at the tail of a run's record that were failures, since somebody started it by hand."""
    out: list[dict[str, Any]] = []
    for line in reversed(record):
        if line.get("event") == "start" and line.get("by_hand"):
            break
        if line.get("event") != "end" or line.get("verdict") == STOPPED:
            continue  # preempted: says nothing about the run
        if line.get("verdict") not in FAILURES:
            break
        out.append(line)
    return out[::-1]


def without_progress(ends: Sequence[dict[str, Any]]) -> int:
    """Return how many of the last failures have the same newest checkpoint."""
    return _equal_tail([line.get("saved") for line in ends])


def loop(ends: Sequence[dict[str, Any]], policy: Policy) -> str:
    """Return why a run must not be started again, "" where it may."""
    same = _equal_tail([(line.get("saved"), line.get("step")) for line in ends])
    if same >= policy.same_step:
        return f"it failed {same} times at step {ends[-1].get('step')}"
    stuck = without_progress(ends)
    if stuck >= policy.no_progress:
        return f"it failed {stuck} times without a checkpoint after step {max(0, ends[-1].get('saved', 0))}"
    return ""


def _equal_tail(values: Sequence[Any]) -> int:
    """Return how many values at the end are equal to the last."""
    count = 0
    for value in reversed(values):
        if value != values[-1]:
            break
        count += 1
    return count
