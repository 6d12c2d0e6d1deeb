"""The data commands one after the other, each killed once and run again, on processes and on Ray: the same bytes?

    python -m tests.soak.chain [--limit N] [--size 64] [--folder FOLDER] [--seed 0] [--out tests/soak/results/chain.md]

build (recipe openclipart), validate, stats, dedup, filter and reshard run three times, each on what its own forerunner
wrote: without a stop; with a kill -9 of the command and its workers after a number of results that the seed draws; and
so once more with `--engine ray` (build draws by itself and knows no engine: Ray starts with a copy). Everything that a
command writes or prints must be equal in all three, but for what it keeps for going on.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.race import ROOT, machine

STEPS = ("build", "validate", "stats", "dedup", "filter", "reshard")
WAYS = ("straight", "killed", "ray")
WORKERS = 2
PATIENCE = 3600  # seconds of one command


class Step(NamedTuple):
    """One command of a chain."""

    words: list[str]
    state: Path  #: where its results appear while it runs
    results: str  #: what they are called
    output: Path  #: what it writes


class Run(NamedTuple):
    """How one command went."""

    seconds: float  #: of the run that was not killed, or of the one that went on
    killed_after: int  #: results; 0: it was not killed
    kept: int  #: results that the second run found


def steps(folder: Path, *, limit: int | None, shard_size: int, pixels: int, ray: bool) -> dict[str, Step]:
    """Return the commands of one chain, which works below `folder`."""
    engine = ["--engine", "ray" if ray else "local", "--workers", str(WORKERS)]
    clipart, unique, good, cut = (folder / name for name in ("clipart", "unique", "good", "cut"))
    page, known = folder / "clipart.html", folder / "validate-state"
    size, less = ["--shard-size", str(shard_size)], ["--limit", str(limit)] if limit else []
    build = ["build", "--recipe", "openclipart", "--out", str(clipart), "--size", str(pixels), *size, *less]
    rules = ["--min-words", "2", "--no-noise"]
    cutting = ["--shuffle", "1", "--validation-fraction", "0.05", *size]

    def copying(words: list[str], source: Path, out: Path) -> Step:
        return Step([words[0], str(source), "--out", str(out), *words[1:], *engine], out / ".build", "*.result", out)

    return {
        "build": Step([*build, "--workers", str(WORKERS)], clipart / ".build", "*.tar.json", clipart),
        "validate": Step(
            ["validate", str(clipart), "--decode", "--json", "--state", str(known), *engine],
            known, "*.result", folder / "validate.json",
        ),
        "stats": Step(
            ["stats", str(clipart), "--out", str(page), *engine],
            page.with_name(f".{page.name}.unfinished"), "*.result", page,
        ),
        "dedup": copying(["dedup", "--caption-similarity", "0.9", "--match", "both", *size], clipart, unique),
        "filter": copying(["filter", *rules, *size], unique, good),
        "reshard": copying(["reshard", *cutting], good, cut),
    }  # fmt: skip


def to_its_end(name: str, step: Step) -> float:
    """Run a command; return its seconds.

    Raises:
        RuntimeError: it failed.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "data_tools", *step.words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(step.words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    if name == "validate":
        step.output.write_text(done.stdout)
    return time.monotonic() - start


def cut_short(step: Step, after: int) -> int:
    """Start a command and kill it and its workers once `after` results are there; return how many it leaves.

    Raises:
        RuntimeError: it ended before that.
    """
    command = [sys.executable, "-m", "data_tools", *step.words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + PATIENCE
        while count(step) < after and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    if run.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{' '.join(step.words)}: ended with {run.returncode} before it could be killed")
    return count(step)


def count(step: Step) -> int:
    """Return how many results a command has so far."""
    return sum(1 for _ in step.state.glob(step.results))


def contents(path: Path) -> dict[str, bytes]:
    """Return what a command wrote, by name; without what it keeps for going on."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")}


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of files that are not equal in both."""
    left, right = contents(one), contents(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def chains(folder: Path, *, limit: int | None, shard_size: int, pixels: int, seed: int) -> list[str]:
    """Run all chains; return the rows of a table.

    Raises:
        RuntimeError: a command failed, or wrote something else than it does without a stop.
    """
    draw, rows = random.Random(seed), []
    plans = {w: steps(folder / w, limit=limit, shard_size=shard_size, pixels=pixels, ray=w == "ray") for w in WAYS}
    for name in STEPS:
        cells = []
        for way, plan in plans.items():
            (folder / way).mkdir(parents=True, exist_ok=True)
            step, like = plan[name], plans["straight"][name]
            if way == "straight":
                seconds = to_its_end(name, step)
                cells.append(f"{seconds:.0f} s, {len(contents(step.output))} files")
                print(f"{name:10s} {way:10s} {cells[-1]}", flush=True)
                continue
            if way == "ray" and name == "build":
                shutil.copytree(like.output, step.output)
                cells.append("-")
                continue
            kept = cut_short(step, 1 + draw.randrange(5))
            seconds = to_its_end(name, step)
            if found := differing(like.output, step.output):
                raise RuntimeError(f"{name}, {way}: after a kill, {found} differ from the run without one")
            cells.append(f"killed with {kept} results, then {seconds:.0f} s; equal")
            print(f"{name:10s} {way:10s} {cells[-1]}", flush=True)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def report(rows: Sequence[str], *, command: str, minutes: float, size: str) -> str:
    """Return the results as a page."""
    return "\n".join([
        "# The data commands, each killed once", "",
        f"`{command}`: {size}. {machine()}, {minutes:.1f} minutes. Load of the machine at the end, all programs: "
        f"{os.getloadavg()[1]:.0f}.", "",
        "Seconds are of the whole command: without a stop, or of the second run after the kill. `equal`: every file "
        "that the command writes (of validate its report) has the bytes of the run without a stop.", "",
        "| | without a stop | processes, killed | Ray, killed |", "|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def main() -> int:
    """Run the chains and write the results; return 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=None, help="drawings (default: all 8,121)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default 256, the recipe's own)")
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="draws after how many results each command is killed")
    parser.add_argument("--folder", help="where the sets are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="write the results there")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        try:
            more = {"limit": args.limit, "shard_size": args.shard_size, "pixels": args.size, "seed": args.seed}
            rows = chains(folder, **more)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        tars = list((folder / "straight" / "clipart").glob("*.tar"))
        size = f"{len(tars)} shards, {sum(path.stat().st_size for path in tars) / 1e6:.0f} MB"
    command = f"python -m tests.soak.chain --size {args.size} --shard-size {args.shard_size}"
    command += f" --limit {args.limit}" if args.limit else ""
    page = report(rows, command=command, minutes=(time.monotonic() - begin) / 60, size=size)
    print(page)
    if args.out:
        args.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
