"""kill -9 at random moments, saves included, and what the same command makes of what is left.

    python -m tests.soak.kills --kills 50 [--seed 0] [--out tests/soak/results/kills.md]

Two ranks train a tiny module and save every third step. A run is killed (one rank, or both at the same moment) after a
time drawn from the seed, while some disks are slowed down so that kills fall into saves; then the same command goes on.
After each kill: `latest`, where there is one, names a complete checkpoint whose sums are right. After the last: the
weights and moments have the bits of a run that was never killed, and so have the losses that are logged.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from launcher.world import free_port
from pretrain.engine import checkpoint, pieces

STEPS, EVERY, WORLD = 90, 3, 2


def start(folder: Path, *, slow: float, steps: int = STEPS) -> list[int]:
    """Fork ranks that train in `folder`; return their pids. `slow` is the seconds that each piece of a write takes."""
    port = free_port()
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            code = train(folder, rank, port, slow=slow, steps=steps)
        except BaseException as error:
            os.write(2, f"rank {rank}: {type(error).__name__}: {str(error)[:160]}\n".encode())
        finally:
            os._exit(code)
    return pids


def train(folder: Path, rank: int, port: int, *, slow: float, steps: int) -> int:
    """Be one rank of a run; return its exit code."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    with open(folder.parent / f"{folder.name}-{rank}.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pretrain.engine import process
    from tests import trouble
    from tests.pretrain.engine import tiny_run

    trouble.slow_disk(slow)
    device = process.setup_process_group()
    words = [f"train.steps={steps}", f"checkpoint.every_steps={EVERY}", "pause=0.02"]
    return tiny_run.run(str(folder), *words, device=device)[0]


def wait(pids: list[int], seconds: float) -> dict[int, int]:
    """Return the exit codes of the processes that end within `seconds`."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def steps(folder: Path, pids: list[int]) -> None:
    """Wait until a run has made a step since it was started."""
    file = folder / "metrics.jsonl"
    began, deadline = time.time(), time.monotonic() + 200
    while not file.exists() or file.stat().st_mtime < began or not file.stat().st_size:
        assert time.monotonic() < deadline and not any(ended(pid) for pid in pids), f"{folder}: no step"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Return whether a child has ended, without taking its exit code."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pids: list[int], victims: list[int]) -> None:
    """Kill the victims; the others must notice by themselves, or are killed after 20 seconds."""
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    left = wait(pids, 20)
    for pid in set(pids) - left.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def state_of(folder: Path) -> str:
    """Return what a kill has left; raise where `latest` names no usable checkpoint."""
    latest = folder / "checkpoints" / "latest"
    hidden = list((folder / "checkpoints").glob(".*.part"))
    if latest.exists():
        named = folder / "checkpoints" / latest.read_text().strip()
        pieces.verify(named)
        checkpoint.read_weights(named)
    if hidden:
        return "in a save"
    return "between saves" if latest.exists() else "before the first save"


def bits(folder: Path) -> dict[str, bytes]:
    """Return all bytes of the newest checkpoint's parts, and the losses."""
    named = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = json.dumps([(line["step"], line["loss"]) for line in lines]).encode()
    return {**{p.name: p.read_bytes() for p in named.glob("part-*")}, "losses": losses}


def soak(root: Path, kills: int, *, seed: int) -> Counter[str]:
    """Kill runs until `kills` are done; return how often each moment was hit.

    Raises:
        AssertionError: a resume that failed, or an end with other bits.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  (forked ranks find the slow imports done)

    from tests.pretrain.engine import tiny_run  # noqa: F401

    moments: Counter[str] = Counter()
    pids = start(root / "whole", slow=0.0)
    assert set(wait(pids, 300).values()) == {0}, "the run that is not killed fails"
    expected = bits(root / "whole")
    rng, run = random.Random(seed), 0
    while moments.total() < kills:
        run += 1
        folder = root / f"run-{run}"
        for _ in range(rng.randint(3, 8)):  # kills of one run
            pids = start(folder, slow=rng.choice([0.0, 0.05, 0.1]))
            starts = rng.random() < 0.15
            if not starts:
                steps(folder, pids)
            codes = wait(pids, rng.uniform(0.0, 2.0 if starts else 1.5))
            if codes and set(codes.values()) == {0}:
                break  # it was done before
            assert not codes, f"{folder}: a resume failed with {sorted(codes.values())}"
            kill(pids, rng.choice([pids, pids[:1], pids[1:]]))
            moments[state_of(folder)] += 1
            print(f"{moments.total()} of {kills}: {dict(moments)}", flush=True)
            if moments.total() == kills:
                break
        codes = wait(start(folder, slow=0.0), 300)
        assert len(codes) == WORLD and set(codes.values()) == {0}, f"{folder}: the last resume failed: {codes}"
        found = bits(folder)
        assert found == expected, f"{folder}: other bits in {[k for k in expected if found.get(k) != expected[k]]}"
    moments["runs"] = run
    return moments


def main() -> int:
    """Kill, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as Markdown")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        moments = soak(Path(folder), args.kills, seed=args.seed)
    runs = moments.pop("runs")
    text = (
        "# Kills\n\n"
        f"`python -m tests.soak.kills --kills {args.kills} --seed {args.seed}` on {os.cpu_count()} cores "
        f"({platform.machine()}), {(time.monotonic() - began) / 60:.0f} minutes: {args.kills} times kill -9 of one or "
        f"both ranks, in {runs} runs of {STEPS} steps that save every {EVERY}.\n\n"
        "| moment | kills |\n|---|---|\n" + "".join(f"| {name} | {n} |\n" for name, n in sorted(moments.items())) + "\n"
        f"Every resume went on; `latest` never named an unusable checkpoint; all {runs} runs ended with the weights, "
        "moments and logged losses of the run that was not killed, bit for bit.\n"
    )
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
