"""One progress bar with an ETA for all commands: lively on a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

LOG_EVERY_S = 15.0


def bar(total: int, *, doing: str, unit: str, quiet: bool = False) -> "tqdm[None]":
    """Return a bar to be used as a context manager and moved by `update`; a quiet one shows nothing."""
    lively = sys.stderr.isatty()
    often = 0.2 if lively else LOG_EVERY_S
    return tqdm(total=total, desc=doing, unit=unit, mininterval=often, maxinterval=LOG_EVERY_S, disable=quiet)
