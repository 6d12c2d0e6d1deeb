"""The report of a run, in whatever state it is: `python -m pretrain.report RUN [RUN ...]` writes RUN/report.html."""

import argparse
import sys
from pathlib import Path

from pretrain.report import write


def main(words: list[str] | None = None) -> int:
    """Write the reports of some runs; 2 where a folder is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.report",
        description=__doc__.splitlines()[0],
        epilog="example: python -m pretrain.report runs/clip_iconcaps",
    )
    parser.add_argument("run", nargs="+", type=Path, help="a run folder")
    for folder in parser.parse_args(words).run:
        if not (folder / "config.yaml").is_file():
            print(f"error: {folder}: no config.yaml there; name a run folder, e.g. runs/clip_iconcaps", file=sys.stderr)
            return 2
        print(write.write(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
