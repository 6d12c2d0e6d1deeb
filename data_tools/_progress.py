"""One progress bar with an ETA for all commands: lively on a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

LOG_EVERY_S = 15.0


def bar(total: int, *, doing: str, unit: str) -> "tqdm[None]":
    """Return a bar to be used as a context manager and moved by `update`."""
    lively = sys.stderr.isatty()
    return tqdm(total=total, desc=doing, unit=unit, mininterval=0.2 if lively else LOG_EVERY_S, maxinterval=LOG_EVERY_S)
