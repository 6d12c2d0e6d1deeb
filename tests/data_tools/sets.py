"""Small data sets for the tests of data commands, and what it takes to kill a command in the middle."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data import format as shards

ROOT = Path(__file__).resolve().parents[2]


def pixels(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Return a smooth random picture."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Return a picture as bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Write one shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with shards.ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.add(key, members)
    return path


def pairs(folder: Path, *, number: int = 6, samples: int = 8, prefix: str = "train", first: int = 0) -> Path:
    """Write shards of different pictures with different captions, indexes and dataset.json; return the folder."""
    counts = {}
    for shard in range(number):
        path = folder / f"{prefix}-{shard:05d}.tar"
        numbers = range(first + shard * samples, first + (shard + 1) * samples)
        write(
            path,
            {
                f"{n:06d}": {
                    "jpg": encoded(pixels(n, 40 + n % 7, 40)),
                    "txt": f"picture number {n} of many {'really ' * (n % 3)}{n * n}".encode(),
                    "json": f'{{"id": {n}}}'.encode(),
                }
                for n in numbers
            },
        )
        counts[path.name] = (samples, path.stat().st_size)
    listed = shards.read_manifest(folder)["shards"]
    others = {name: (row["samples"], row["bytes"]) for name, row in listed.items()}
    shards.write_manifest(folder, {**others, **counts}, {})
    return folder


def read(folder: Path, pattern: str = "*.tar") -> dict[str, dict[str, bytes]]:
    """Return all samples of a folder by key, in file order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            for entry in shards.read_index(path):
                assert entry.key not in found
                found[entry.key] = shards.read_members(file, entry)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder but hidden ones."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}


def kill_in_the_middle(words: Sequence[str], state: Path, *, results: str = "*.result", after: int = 5) -> None:
    """Start a command, and kill it without mercy once some of its results lie in `state`."""
    command = [sys.executable, "-m", "data_tools", *words]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list(state.glob(results))) < after and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the command was done before it could be killed"
    assert len(list(state.glob(results))) >= after


def again(words: Sequence[str]) -> str:
    """Run a command to its end in a process of its own and return what it printed."""
    command = [sys.executable, "-m", "data_tools", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
