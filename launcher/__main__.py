"""The command line of the launcher, `python -m launcher run|submit|status|resume|doctor`.

Exit codes: the run's own (0 finished, 85 saved and to be started again, 130 Ctrl-C); 1 failed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from launcher.job import JobError
from launcher.slurm import SlurmError

COMMANDS = ("run", "submit", "status", "resume", "doctor")
EXAMPLE = "example: python -m launcher run --ranks-per-node 2 pretrain/configs/clip_iconcaps.yaml train.steps=200"


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and that of each command, which is a file beside this one."""
    out = argparse.ArgumentParser(
        prog="python -m launcher", description=(__doc__ or "").splitlines()[0], epilog=EXAMPLE
    )
    children = {}
    commands = out.add_subparsers(dest="command", metavar="|".join(COMMANDS), required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"launcher.{name}")
        child = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(child)
        child.set_defaults(run=module.run)
        children[name] = child
    return out, children


def main(words: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if words is None else words
    parser, children = parsers()
    if words and words[0] in children:  # options may stand anywhere, also between the overrides
        args = children[words[0]].parse_intermixed_args(words[1:])
    else:
        args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SlurmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
