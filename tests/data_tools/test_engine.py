"""The engine: order, resumption, processes, a Ray cluster, and what goes wrong there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import _engine, _pack
from pretrain.config import ConfigError
from pretrain.data.format import ShardError
from tests.data_tools import sets


def double(number: int) -> bytes:
    if number == 99:
        raise ShardError("shard 99: is broken")
    time.sleep(0.02 * (number % 3))  # so that processes finish out of order
    return str(2 * number).encode()


def count(place: tuple[str, int]) -> bytes:
    with open(place[0], "a") as file:
        file.write(f"{place[1]}\n")
    return b""


def kill_worker(parent: int) -> bytes:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return b""


def slow(path: str) -> bytes:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
    return b""


def tasks(numbers: range) -> list[_engine.Task]:
    return [_engine.Task(f"t{number}", number, _engine.digest(number)) for number in numbers]


def run(work, todo, state: Path, **options) -> list[bytes]:
    return list(_engine.run(work, todo, state=state, engine=_engine.Engine(**options), doing="test"))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(tmp_path: Path, workers: int) -> None:
    assert run(double, tasks(range(9)), tmp_path, workers=workers) == [str(2 * n).encode() for n in range(9)]


def test_what_is_done_is_kept_and_what_changed_is_done_again(tmp_path: Path) -> None:
    log, state = tmp_path / "log", tmp_path / "state"

    def some(versions: dict[int, str]) -> list[_engine.Task]:
        return [_engine.Task(str(n), (str(log), n), _engine.digest(n, version)) for n, version in versions.items()]

    run(count, some({1: "a", 2: "a"}), state)
    run(count, some({1: "a", 2: "b", 3: "a"}), state)
    assert log.read_text().split() == ["1", "2", "2", "3"]
    todo = some({1: "a", 2: "b", 3: "a"})
    assert len(list(_engine.run(
        count, todo, state=state, engine=_engine.Engine(), doing="test", fits=lambda task, result: task.name != "3"
    ))) == 3  # fmt: skip
    assert log.read_text().split() == ["1", "2", "2", "3", "3"]
    (state / "other").touch()
    _engine.forget(state)
    assert [p.name for p in state.iterdir()] == ["other"], "only what is its own"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_comes_through_and_the_rest_is_kept(tmp_path: Path, workers: int) -> None:
    todo = [*tasks(range(4)), *tasks(range(99, 100)), *tasks(range(4, 9))]
    with pytest.raises(ShardError, match="shard 99: is broken"):
        run(double, todo, tmp_path, workers=workers)
    assert list(tmp_path.glob("t?.result"))


def test_a_killed_worker_is_a_sentence(tmp_path: Path) -> None:
    todo = [_engine.Task(str(n), os.getpid(), "x") for n in range(3)]
    with pytest.raises(ShardError, match="a worker process was killed"):
        run(kill_worker, todo, tmp_path, workers=2)


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from data_tools import _engine
from tests.data_tools.test_engine import slow
if __name__ == "__main__":
    todo = [_engine.Task(str(n), f"{tmp_path}/pid{{n}}", "x") for n in range(2)]
    list(_engine.run(slow, todo, state=Path("{tmp_path}/state"), engine=_engine.Engine(workers=2), doing="test"))
"""
    (tmp_path / "start.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(sets.ROOT)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], cwd=sets.ROOT, env=env, stderr=-3)
    while not all((tmp_path / f"pid{n}").exists() and (tmp_path / f"pid{n}").read_text() for n in range(2)):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    workers = [int((tmp_path / f"pid{n}").read_text()) for n in range(2)]
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_pack() -> None:
    import numpy as np

    tree, arrays = _pack.unpack(_pack.pack({"a": [1, "b"]}, x=np.arange(3, dtype=np.uint64)))
    assert tree == {"a": [1, "b"]}
    assert arrays["x"].tolist() == [0, 1, 2]


def test_ray_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'diptych\[ray\]'"):
        run(double, tasks(range(2)), tmp_path, kind="ray")


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads and signal handlers behind."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    source = sets.pairs(tmp_path / "in", number=8)
    words = ["reshard", str(source), "--shuffle", "3", "--shard-size", "7"]
    sets.again([*words, "--out", str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"])
    sets.again([*words, "--out", str(tmp_path / "local"), "--workers", "1"])
    assert sets.contents(tmp_path / "ray") == sets.contents(tmp_path / "local")


def where(number: int) -> bytes:
    if number:
        time.sleep(1)
        raise ShardError("shard 99: is broken")
    import ray

    return ray.util.get_node_ip_address().encode()


@pytest.mark.slow
def test_ray_of_its_own_is_on_the_loopback_and_tells_errors(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    script = f"""
from pathlib import Path
from data_tools import _engine
from tests.data_tools.test_engine import where
todo = [_engine.Task(str(n), n, "x") for n in range(2)]
try:
    list(_engine.run(where, todo, state=Path({str(tmp_path)!r}), engine=_engine.Engine("ray", 2), doing="test"))
except _engine.ShardError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=sets.ROOT, capture_output=True, text=True, timeout=400)
    assert done.stdout.strip() == "shard 99: is broken", done.stderr
    assert (tmp_path / "0.result").read_bytes() == b"x\n127.0.0.1"
