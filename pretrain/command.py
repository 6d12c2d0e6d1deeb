"""The command line that programs share: a config with overrides in, one sentence and an exit code out.

0 done; 1 the run failed; 2 the config, the data or the usage is wrong; 85 and 130 a signal, after a save.
"""

import argparse
import os
import time
from collections.abc import Callable

from pretrain import config
from pretrain.config import ConfigError
from pretrain.data.format import ShardError
from pretrain.data.quarantine import TooManyBad
from pretrain.engine import process
from pretrain.engine.checkpoint import CheckpointError
from pretrain.engine.recovery import TrainingError
from pretrain.engine.run_folder import StaleRunError

UNUSABLE = (ConfigError, ShardError)
FAILED = (TrainingError, CheckpointError, StaleRunError, TooManyBad)


def parser(doc: str | None, example: str) -> argparse.ArgumentParser:
    """Return a parser with the program's first line as its description, and the words that launchers add."""
    out = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0], epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return out


def training_parser(doc: str | None, example: str) -> argparse.ArgumentParser:
    """Return the parser of a program that trains."""
    out = parser(doc, example)
    out.add_argument("--config", metavar="FILE", help="a YAML config")
    out.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    out.add_argument("--schema", action="store_true", help="print the JSON schema of a config and stop")
    out.add_argument("override", nargs="*", metavar="section.key=value", help="changes to the config")
    return out


def guarded(action: Callable[[], int]) -> int:
    """Return what `action` returns; say a known error in one sentence on stderr and exit with its code."""
    try:
        return action()
    except UNUSABLE as error:
        return _fail(error, code=2)
    except FAILED as error:
        return _fail(error, code=1)
    finally:
        process.shutdown()


def _fail(error: Exception, *, code: int) -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"  # the process group may not exist yet
    if rank != "0":
        time.sleep(3)  # ranks mostly fail alike: rank 0 has spoken by then, and its launcher has ended this one
    config.exit_with(error, code=code)
