"""A pool of gloo ranks for tests: processes that have imported torch and deepspeed already, started once a session.

    def job(stage, seed):              # a top-level function of any importable module, called on every rank
        ...dist.rank(), dist.world(), collectives, deepspeed...
        return result                  # anything that pickles

    def test_it(ranks):                # the fixture of tests/conftest.py; or `from tests.ranks import POOL`
        first, second = ranks.run(2, job, 1, seed=0)        # results in rank order

Each call gets a fresh process group (a new file store) and leaves none behind; world 1 runs in a worker as well. A rank
that raises makes the call raise RankError with its traceback; ranks that hang are killed after `timeout` seconds (5
when another rank has failed), with their stacks in the message; the next call starts new ones. One thread a worker.

Ranks are forks of one process that has done the imports (4 s of CPU) and nothing else: a new one is there at once.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5.0
LINEAR = torch.nn.functional.linear


def a_port(lane: int = 0) -> str:
    """Return a free port for a launcher, from below those that the system hands out by itself.

    Launchers that start at the same time ask for lanes of their own: a port is taken a while after it was found free.
    """
    for port in range(20000 + (os.getpid() * 7 + lane * 500) % 10000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return str(port)
    raise RuntimeError("no port is free between 20000 and 32000")


class RankError(AssertionError):
    """A rank raised or hung; the message carries its traceback."""


class _Nursery:
    """The process that has imported everything. Ranks are its children, so it also knows how they ended."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the nursery)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        self.fixed = {name: env[name] for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
        )
        theirs.close()
        self.pipe = Connection(ours.detach())

    def bear(self, pipe: socket.socket, log: IO[bytes]) -> int:
        """Fork a rank with this test's environment, which talks through `pipe` and prints to `log`."""
        self.pipe.send_bytes(pickle.dumps(("bear", {**os.environ, **self.fixed})))
        for file in (pipe, log):
            reduction.send_handle(self.pipe, file.fileno(), None)  # type: ignore[arg-type]  # no pid on Unix
        try:
            return int(pickle.loads(self.pipe.recv_bytes()))
        except EOFError:
            raise RankError(f"the imports of the ranks failed:\n{tail(self.log)}") from None

    def ended(self, pid: int, *, wait: bool) -> int | None:
        """Return the exit code of a rank, minus the signal that killed it; None: it runs."""
        self.pipe.send_bytes(pickle.dumps(("ended", (pid, wait))))
        code: int | None = pickle.loads(self.pipe.recv_bytes())
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class _Worker:
    def __init__(self, rank: int, nursery: _Nursery) -> None:
        ours, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.nursery = nursery
        self.pid = nursery.bear(theirs, self.log)
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.rank = rank
        self._code: int | None = None

    def code(self, *, wait: bool = False) -> int | None:
        """Return how the process has ended; None: it runs."""
        if self._code is None:
            self._code = self.nursery.ended(self.pid, wait=wait)
        return self._code

    def signal(self, number: signal.Signals) -> None:
        if self.code() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.code(wait=True)
        self.pipe.close()


def tail(log: IO[bytes]) -> str:
    """Return the end of what a process has printed."""
    log.seek(0)
    return log.read().decode(errors="replace")[-4000:]


class Pool:
    """Workers, started when first wanted."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._nursery: _Nursery | None = None
        atexit.register(self.end)

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 300, **kwargs: Any
    ) -> list[Any]:
        """Return what `function(*args, **kwargs)` returned on each of `world` ranks."""
        while len(self._workers) < world:
            self._nursery = self._nursery or _Nursery()
            self._workers.append(_Worker(len(self._workers), self._nursery))
        busy = self._workers[:world]
        with tempfile.TemporaryDirectory() as folder:
            for w in busy:
                call = (function.__module__, function.__qualname__, args, kwargs)
                w.pipe.send_bytes(pickle.dumps((w.rank, world, os.path.join(folder, "store"), call)))
            results = self._collect(busy, time.monotonic() + timeout)
        failed = [(rank, text) for rank, (ok, text) in sorted(results.items()) if not ok]
        hung = [w for w in busy if w.rank not in results]
        if failed or hung:
            message = "\n".join(f"rank {rank} of {world} failed:\n{text}" for rank, text in failed)
            message += "".join(f"\nrank {w.rank} of {world} hung:\n{self._stack(w)}" for w in hung)
            if hung or any(w.code() is not None for w in busy):
                self.close()
            raise RankError(message)
        return [results[w.rank][1] for w in busy]

    def _collect(self, busy: list[_Worker], deadline: float) -> dict[int, tuple[bool, Any]]:
        results: dict[int, tuple[bool, Any]] = {}
        while len(results) < len(busy) and time.monotonic() < deadline:
            waiting = {w.pipe: w for w in busy if w.rank not in results}
            for pipe in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                w = waiting[pipe]  # type: ignore[index]
                try:
                    results[w.rank] = pickle.loads(w.pipe.recv_bytes())
                except (EOFError, OSError):
                    results[w.rank] = (False, f"the process died with {w.code(wait=True)}\n{tail(w.log)}")
                if not results[w.rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results

    def _stack(self, w: _Worker) -> str:
        w.signal(signal.SIGUSR2)
        time.sleep(0.3)
        return tail(w.log)

    def close(self) -> None:
        """Kill all workers."""
        for w in self._workers:
            w.kill()
        self._workers = []

    def end(self) -> None:
        """Kill all workers, and what they come from."""
        self.close()
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


POOL = Pool()


def _call(rank: int, world: int, store: str, call: tuple[str, str, tuple, dict]) -> Any:
    import deepspeed
    import torch.distributed as torch_dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    from pretrain.engine import process, recorder

    # ZeRO-3 numbers parameters and modules per process and compares the numbers between ranks; earlier calls, with
    # fewer ranks, used them up unequally
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # for code that reads them; the store is the file
    process.quiet_deepspeed()
    recorder.switch_on()
    torch_dist.init_process_group("gloo", store=torch_dist.FileStore(store, world), rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    try:
        module, name, args, kwargs = call
        return getattr(importlib.import_module(module), name)(*args, **kwargs)
    finally:
        gc.unfreeze()  # trainers freeze
        gc.collect()  # engines hold process groups in cycles; only shutdown may be the last to hold one
        process.shutdown()
        # ZeRO-3 replaces this for good; where only some ranks ran it, gradients would become ready in another order
        # there, and stages 1 and 2, which reduce them in that order, would add up the wrong ones
        torch.nn.functional.linear = LINEAR


def _serve(pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=False)
    while True:
        try:
            rank, world, store, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, _call(rank, world, store, call))
        except BaseException:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps(answer))  # plain bytes: Connection.send would pass tensors as file handles


def _rank(channel: Connection, env: dict[str, str], pipe: int, log: int) -> NoReturn:
    """Be a rank to the end."""
    channel.close()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    try:
        _serve(Connection(pipe))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _nurse(channel: Connection) -> None:
    """Import what ranks need, then fork them and tell how they have ended."""
    import deepspeed  # noqa: F401

    import pretrain.engine.process
    import pretrain.main

    pretrain.engine.process.quiet_deepspeed()
    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a fork has only the thread that forks"
    gc.freeze()
    while True:
        try:
            word, value = pickle.loads(channel.recv_bytes())
        except EOFError:
            return
        if word == "bear":
            pipe, log = reduction.recv_handle(channel), reduction.recv_handle(channel)
            answer = os.fork()
            if not answer:
                _rank(channel, value, pipe, log)
            os.close(pipe)
            os.close(log)
        else:
            pid, patient = value
            found, status = os.waitpid(pid, 0 if patient else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        channel.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _nurse(Connection(int(sys.argv[1])))
