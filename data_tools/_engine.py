"""One function over many shards, on processes of this machine or on a Ray cluster; killed, it goes on where it stopped.

What a task returned is kept in a folder under the task's name and a digest of all that it depends on; the next run
takes from there what still fits. Results come in the order of the tasks, whoever finished first.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import _progress
from data_tools._arguments import positive
from pretrain.config import ConfigError
from pretrain.data.format import ShardError, write_atomic

KINDS = ("local", "ray")
SMALL = 64 * 1024 * 1024  # bytes: less is read sooner than processes start
AHEAD = 2  # tasks in flight for each worker, so that none waits for the driver
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

Work = Callable[[Any], bytes]
Pool = Callable[[Work, Sequence["Task"], int], Iterator[tuple[int, bytes]]]


class Task(NamedTuple):
    """One call of the work."""

    name: str  #: unique in its folder of results
    argument: Any
    digest: str  #: of everything that the result depends on
    size: int = 0  #: bytes that it reads, as far as known


class Engine(NamedTuple):
    """Who does the work."""

    kind: str = "local"
    workers: int | None = None  #: None: one for each core, or none where there is little to do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands over shards have."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--workers", type=positive, default=None, metavar="N", help="processes (default: one for each core)"
    )
    group.add_argument(
        "--engine",
        choices=KINDS,
        default="local",
        help="ray: on the cluster that RAY_ADDRESS names, else on N Ray workers here; the output is the same",
    )


def chosen(args: argparse.Namespace) -> Engine:
    """Return the engine that the options ask for."""
    return Engine(args.engine, args.workers)


def digest(*parts: Any) -> str:
    """Return a hash of values; a path stands for the file as it is now (name, size, time)."""
    total = sha256()
    for part in parts:
        if isinstance(part, Path):
            stat = part.stat()
            part = (str(part.absolute()), stat.st_size, stat.st_mtime_ns)
        total.update(part if isinstance(part, bytes) else repr(part).encode())
        total.update(b"\0")
    return total.hexdigest()


def run(
    work: Work,
    tasks: Sequence[Task],
    *,
    state: Path,
    engine: Engine,
    doing: str,
    fits: Callable[[Task, bytes], bool] = lambda task, result: True,
) -> Iterator[bytes]:
    """Do all tasks, then yield their results in order. `fits` says whether a kept result can still be used.

    Raises:
        ConfigError: an engine that is not installed.
        ShardError: a worker was killed; else whatever the work raises.
    """
    state.mkdir(parents=True, exist_ok=True)
    pending = [task for task in tasks if (kept := _kept(state, task)) is None or not fits(task, kept)]
    with _progress.bar(len(tasks), doing=doing, unit="shard") as bar:
        bar.update(len(tasks) - len(pending))
        bar.initial = bar.n  # the ETA counts what this run does
        for number, result in _pool(engine.kind)(work, pending, _workers(engine, pending)):
            task = pending[number]
            write_atomic(_place(state, task), task.digest.encode() + b"\n" + result)
            bar.update()
    for task in tasks:
        if (found := _kept(state, task)) is None:
            raise ShardError(f"{state}: another run of the same command cleared it; run it again")
        yield found


def forget(state: Path) -> None:
    """Remove what was kept of finished work, and the folder if nothing else is in it."""
    for place in state.glob("*.result"):
        place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        state.rmdir()


def _place(state: Path, task: Task) -> Path:
    return state / f"{task.name}.result"


def _kept(state: Path, task: Task) -> bytes | None:
    try:
        found, _, result = _place(state, task).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return result if found == task.digest.encode() else None


def _workers(engine: Engine, pending: Sequence[Task]) -> int:
    if engine.workers is None and engine.kind == "local" and sum(task.size for task in pending) < SMALL:
        return 1
    return max(1, min(engine.workers or len(os.sched_getaffinity(0)), len(pending)))


def _pool(kind: str) -> Pool:
    return {"local": _local, "ray": _ray}[kind]


def _local(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the task, result) as they come; one worker is this process itself."""
    if workers == 1:
        for number, task in enumerate(tasks):
            yield number, work(task.argument)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_settle, initargs=(os.getpid(),))
    left = iter(enumerate(tasks))
    running: dict[Future[bytes], int] = {}
    others = set(multiprocessing.active_children())
    try:
        while True:
            while len(running) < AHEAD * workers and (more := next(left, None)) is not None:
                running[pool.submit(work, more[1].argument)] = more[0]
            if not running:
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda future: future.exception() is not None):  # keep what is good
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, most often for want of memory; the same command goes on, "
            f"with fewer than --workers {workers} if it happens again"
        ) from None
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # a shard may take minutes; what it leaves unfinished is cleared by the next run
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _settle(parent: int) -> None:
    """Make a worker of this process: no threads of libraries, no Ctrl-C of its own, and no life after its parent."""
    os.environ.update(QUIET)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, bytes]]:
    """The same on a Ray cluster, whose machines see the shards under the same paths."""
    ray, started = _connect(workers)
    remote = ray.remote(num_cpus=1)(work)
    left = iter(enumerate(tasks))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < AHEAD * workers and (more := next(left, None)) is not None:
                running[remote.remote(more[1].argument)] = more[0]
            if not running:
                return
            for done in ray.wait(list(running))[0]:
                yield running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ImportError):
            raise ConfigError(f"--engine ray: its workers lack diptych or a part of it ({error.cause})") from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ShardError(f"--engine ray: {str(error).splitlines()[0]}; the same command goes on") from error
    finally:
        if started:
            ray.shutdown()


def _connect(workers: int) -> tuple[Any, bool]:
    """Return the module and whether this call has connected it, to RAY_ADDRESS or to a small cluster of its own."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody else's business
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # 30 are too few where all cores are busy
    if not address:  # Ray's only way to make its servers listen on the loopback device alone
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed; run `pip install 'diptych[ray]'`") from None
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**quiet, **({} if address else own))
    except Exception as error:  # Ray raises plain Exception, ConnectionError, ValueError, ...
        where = f"connect to RAY_ADDRESS={address}" if address else "start here"
        raise ShardError(f"--engine ray: Ray cannot {where} ({str(error).splitlines()[0]:.200})") from error
    return ray, True
