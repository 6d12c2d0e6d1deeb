"""img2dataset in an environment of its own: its pins (webdataset < 0.3, pandas < 3) clash with ours."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_tools import _fetch_child
from pretrain.config import ConfigError
from pretrain.data.format import ShardError

VERSION = "1.47.0"
PYTHONS = ((3, 11), (3, 12))  # pins are for these; img2dataset imports imghdr, which Python 3.13 has no more
GRACE_S = 60.0  # for leaving once every shard is done: it is known to hang there
POLL_S = 0.5

# tried together on Python 3.11; about 800 MB, of which wandb is imported but never asked
PINS = f"""
albucore==0.0.23 albumentations==1.4.24 annotated-types==0.8.0 anyio==4.16.0 braceexpand==0.1.7
certifi==2026.10.19.post1 charset-normalizer==3.5.2 click==8.5.1 cwevals==0.0.1b1 dataclasses==0.6 distro==1.9.0
ExifRead-nocycle==3.0.1 fire==0.7.1 fsspec==2026.9.0 googleapis-common-protos==1.76.0 h11==0.16.0 httpcore==1.0.9
httpx==0.28.1 idna==3.20 img2dataset=={VERSION} numpy==2.4.6 opencv-python-headless==4.14.0.94
opentelemetry-api==1.45.2 opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp-common==0.66b2
opentelemetry-exporter-otlp-proto-common==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2
opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 packaging==26.3
pandas==2.3.3 platformdirs==4.14.8 protobuf==7.36.2 pyarrow==26.0.1 pydantic==2.14.4 pydantic-core==2.50.5
python-dateutil==4.0.0 pytz==2026.6 PyYAML==6.0.4 requests==2.34.2 scipy==1.17.1 simsimd==6.5.16 sniffio==1.3.1
stringzilla==5.3.2 termcolor==3.3.0 tqdm==4.70.1 typing-extensions==4.16.0 typing-inspection==0.4.5 tzdata==2026.6
urllib3==2.8.0 wandb==0.31.0 webdataset==0.2.111 xxhash==4.1.0
""".split()


def environment(cache: Path, python: str | None = None) -> Path:
    """Return the Python of img2dataset's environment; it is made on first use.

    Raises:
        ConfigError: this Python is too new or too old for it.
        ShardError: venv or pip failed; nothing half-made is left.
    """
    python = python or sys.executable
    version = _version(python)
    if version not in PYTHONS:
        known = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise ConfigError(f"img2dataset {VERSION} needs Python {known}, {python} is {version}: name one with --python")
    mark = sha256(" ".join(PINS).encode()).hexdigest()[:8]
    folder = cache / f"img2dataset-{VERSION}-py{version[0]}.{version[1]}-{mark}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second fetch waits until the first has made it
        if not (folder / "READY").exists():
            print(f"making img2dataset's environment, once, about 800 MB: {folder}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)  # half an environment is worse than none
            try:
                _make(folder, python)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder / "bin" / "python"


def _version(python: str) -> tuple[int, int]:
    script = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60)  # noqa: S603
        major, minor = map(int, done.stdout.split())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise ConfigError(f"--python {python}: is no Python that runs; name one, e.g. python3.11") from None
    return major, minor


def _make(folder: Path, python: str) -> None:
    inside = str(folder / "bin" / "python")
    steps = {
        "venv": [python, "-I", "-m", "venv", str(folder)],
        "pip": [inside, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *PINS],
    }
    for name, command in steps.items():
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            said = [line for line in lines if "ERROR" in line] or lines[-1:]
            remedy = "install python3-venv" if name == "venv" else "check the network and pip's index (pip config list)"
            raise ShardError(
                f"{name} could not make img2dataset's environment ({' '.join(said[:2]) or 'no message'}): {remedy}, "
                "then run the same command again"
            )
    (folder / "READY").write_text("\n".join(PINS) + "\n")


def download(
    python: Path, options: Mapping[str, Any], *, log: Path, expected: int, progress: Callable[[int], None]
) -> None:
    """Run one download to its end; `expected` shards leave a NNNNN_stats.json each, `progress` hears of each URL.

    Raises:
        ShardError: it stopped before all shards were done; they are kept, the same command goes on.
    """
    output = Path(str(options["output_folder"]))
    command = [str(python), "-I", _fetch_child.__file__, json.dumps(options)]
    quiet = {"WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as out:
        child = subprocess.Popen(  # noqa: S603 (a fixed program; data goes in as JSON)
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **quiet},
        )  # fmt: skip
        try:
            seen, idle = set[str](), 0.0
            while child.poll() is None:
                time.sleep(POLL_S)
                seen |= _report(output, seen, progress)
                idle = idle + POLL_S if len(seen) >= expected else 0.0
                if idle > GRACE_S:
                    break
            seen |= _report(output, seen, progress)
        finally:
            _end(child)
    if len(seen) < expected:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ShardError(
            f"img2dataset stopped with {len(seen)} of {expected} shards done (exit code {child.returncode}; "
            f"{words[-1][:200] if words else 'no message'}); see {log}, then run the same command again"
        )


def _report(output: Path, seen: set[str], progress: Callable[[int], None]) -> set[str]:
    """Return the stats files that are new, after telling how many URLs they speak of."""
    new = set()
    for path in output.glob("*_stats.json"):
        if path.name not in seen:
            try:
                progress(int(json.loads(path.read_bytes())["count"]))
            except (OSError, ValueError, KeyError):
                continue  # it is being written
            new.add(path.name)
    return new


def _end(child: subprocess.Popen) -> None:
    """End img2dataset and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()
