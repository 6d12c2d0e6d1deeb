"""Rates of the data commands on made-up photographs: `python -m tests.benchmarks.data_tools FOLDER [samples]`.

The set is made once in FOLDER: 400 different photographs (tests/benchmarks/photographs.py), 256 x 256 to 640 x 480, of
quality 75 to 95, a caption and a json member each. CPU time counts children, so a busy machine changes it little.
"""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import _phash, _tar
from pretrain.data import format as shards
from pretrain.data import headers
from tests.benchmarks import photographs

SIZES = ((256, 256), (341, 256), (256, 384), (500, 375), (640, 480))
DIFFERENT = 400
SHARD = 1000


def photo(number: int) -> bytes:
    """Return a JPEG of one of several sizes and qualities, every fourth with an EXIF block."""
    width, height = SIZES[number % len(SIZES)]
    exif = Image.Exif()
    exif[0x010E] = "x" * 3000
    more = {"exif": exif} if number % 4 == 0 else {}
    return photographs.jpeg(width, height, seed=number, quality=75 + 5 * (number % 5), **more)


def make(folder: Path, samples: int) -> None:
    """Write the set, if it is not there."""
    if (folder / shards.MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    photos = [photo(number) for number in range(DIFFERENT)]
    counts = {}
    for start in range(0, samples, SHARD):
        path = folder / f"train-{start // SHARD:05d}.tar"
        with shards.ShardWriter(path) as writer:
            for number in range(start, min(samples, start + SHARD)):
                record = f'{{"url": "example/{number}", "width": 256, "similarity": {number / samples}}}'
                caption = photographs.caption(number).encode()
                members = {"jpg": photos[number % DIFFERENT], "txt": caption, "json": record.encode()}
                writer.add(f"{number:09d}", members)
        counts[path.name] = (len(writer.entries), path.stat().st_size)
    shards.write_manifest(folder, counts, {})


def measure(samples: int, *words: str) -> None:
    """Run one command and print its rates."""
    before, start = os.times(), time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "data_tools", *words], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{' '.join(words)}\n    exit {run.returncode}: {wall:.1f} s = {samples / wall:,.0f} samples/s; ", end="")
    print(f"{cpu:.1f} s of CPU = {samples / cpu:,.0f} samples/s a core, start-up included", flush=True)


def rates_of_hashes(source: Path) -> None:
    """Print how many pictures of 256 x 256 a core hashes, beside imagehash on the same files."""
    import imagehash

    path = sorted(source.glob("*.tar"))[0]
    with _tar.opened(path) as tar:
        entries = [entry for entry in headers.entries_of(path) if tar.picture(entry)[1:3] == (256, 256)][:100]
        files = [tar.image(entry) for entry in entries]
    for name, work in (
        ("data_tools._phash", _phash.look),
        ("imagehash.phash", lambda data: imagehash.phash(Image.open(io.BytesIO(data)))),
    ):
        start = time.process_time()
        rounds = 0
        while time.process_time() - start < 3:
            rounds += 1
            for data in files:
                work(data)
        rate = rounds * len(files) / (time.process_time() - start)
        print(
            f"{name}: {rate:,.0f} pictures of 256 x 256 a second of CPU ({np.mean(list(map(len, files))):,.0f} bytes)"
        )


def plain_copy(source: Path, target: Path) -> None:
    """Print how fast the same bytes are copied and made durable without looking at them."""
    start = time.perf_counter()
    for path in sorted(source.glob("*.tar")):
        with open(path, "rb") as file, open(target, "wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)
            os.fsync(out.fileno())
    size, wall = sum(path.stat().st_size for path in source.glob("*.tar")), time.perf_counter() - start
    target.unlink()
    print(f"plain copy, one process\n    {wall:.1f} s = {size / wall / 1e6:,.0f} MB/s", flush=True)


def main() -> None:
    """Measure all commands."""
    folder, samples = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    source = folder / "photos"
    make(source, samples)
    size = sum(path.stat().st_size for path in source.glob("*.tar"))
    print(f"{samples} samples, {size / 1e6:.0f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure(samples, "validate", str(source))
    measure(samples, "validate", str(source), "--decode")
    plain_copy(source, folder / "copy")
    measure(samples, "stats", str(source), "--out", str(folder / "stats.html"))
    measure(samples, "filter", str(source), "--out", str(folder / "filter"), "--min-side", "260", "--no-noise")
    measure(samples, "dedup", str(source), "--out", str(folder / "dedup"), "--report-only")
    measure(samples, "reshard", str(source), "--out", str(folder / "reshard"), "--shard-size", "4000")
    measure(samples, "reshard", str(source), "--out", str(folder / "shuffle"), "--shuffle", "1")
    rates_of_hashes(source)
    for name in ("filter", "dedup", "reshard", "shuffle"):
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
