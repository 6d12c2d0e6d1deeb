"""The cache never holds more than its bound, whoever is killed when, and shows no file that is not whole."""

import os
import signal
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from pretrain.data import cache, locks
from pretrain.data.cache import Cache
from pretrain.data.format import ShardError
from pretrain.dist import hash64

KIB = 1024


def content(name: str, size: int) -> bytes:
    return (name.encode() * (size // len(name) + 1))[:size]


def filler(name: str, size: int, *, pieces: int = 1, pause: float = 0):
    """What writes a file in pieces, as a download does."""

    def fill(part) -> None:
        data = content(name, size)
        step = -(-size // pieces)
        for start in range(0, size, step):
            part.write(data[start : start + step])
            time.sleep(pause)

    return fill


def get(store: Cache, name: str, size: int, **options) -> bytes:
    with store.open(name, size, filler(name, size, **options)) as file:
        return file.read()


def held(folder: Path) -> int:
    """Bytes of all files. A file that moves while this looks is counted once or twice, never missed below the bound."""
    with locks.locked(folder / ".lock"):
        return sum(entry.stat().st_size for entry in os.scandir(folder))


def test_least_recently_used_goes_first(tmp_path):
    store = Cache(tmp_path, 10 * KIB)
    for name in ("a", "b", "c"):
        assert get(store, name, 3 * KIB) == content(name, 3 * KIB)
    store.find("a").close()  # b is now the oldest
    get(store, "d", 3 * KIB)
    assert sorted(path.name for path in tmp_path.glob("?")) == ["a", "c", "d"]
    get(store, "e", 8 * KIB)
    assert sorted(path.name for path in tmp_path.glob("?")) == ["e"]


def test_a_reader_keeps_what_is_removed(tmp_path):
    store = Cache(tmp_path, 4 * KIB)
    with store.open("a", 3 * KIB, filler("a", 3 * KIB)) as file:
        get(store, "b", 3 * KIB)
        assert not (tmp_path / "a").exists() and file.read() == content("a", 3 * KIB)


def test_what_cannot_fit(tmp_path):
    store = Cache(tmp_path, 4 * KIB)
    with pytest.raises(ShardError, match=r"5,120 bytes is larger than data\.cache_gb allows \(4,096 bytes\); raise"):
        get(store, "a", 5 * KIB)
    with pytest.raises(ShardError, match=r"larger than data\.cache_gb allows"):
        store.open("a", None, filler("a", 5 * KIB, pieces=9))
    assert held(tmp_path) == 0


def test_unknown_length_grows_within_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "STEP", KIB)
    store = Cache(tmp_path, 8 * KIB)
    get(store, "a", 5 * KIB)
    seen = []

    def fill(part) -> None:
        for _ in range(7):
            part.write(b"x" * KIB)
            seen.append(held(tmp_path))

    with store.open("b", None, fill) as file:
        assert file.read() == b"x" * 7 * KIB
    assert max(seen) <= 8 * KIB and held(tmp_path) == 7 * KIB


def test_two_that_grow_do_not_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "STEP", KIB)
    store = Cache(tmp_path, 8 * KIB)
    jobs = [
        threading.Thread(target=lambda n=n: store.open(n, None, filler(n, 6 * KIB, pieces=6, pause=0.01)).close())
        for n in ("a", "b", "c")
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(20)
    assert not any(job.is_alive() for job in jobs) and held(tmp_path) == 6 * KIB


def test_a_failed_download_leaves_nothing(tmp_path):
    store = Cache(tmp_path, 8 * KIB)

    def fill(part) -> None:
        part.write(b"x")
        raise ShardError("gone")

    with pytest.raises(ShardError, match="gone"):
        store.open("a", KIB, fill)
    assert held(tmp_path) == 0 and get(store, "a", KIB) == content("a", KIB)


def test_an_old_file_of_another_length_is_replaced(tmp_path):
    store = Cache(tmp_path, 8 * KIB)
    get(store, "a", KIB)
    assert get(store, "a", 2 * KIB) == content("a", 2 * KIB)


def test_one_process_downloads_and_the_others_wait(tmp_path):
    store = Cache(tmp_path, 8 * KIB)
    runs = []

    def fill(part) -> None:
        runs.append(1)
        filler("a", KIB, pieces=4, pause=0.02)(part)

    jobs = [threading.Thread(target=lambda: store.open("a", KIB, fill).close()) for _ in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(runs) == 1


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"cache .*: Not a directory; name a folder .*data\.cache_dir"):
        Cache(tmp_path / "file" / "cache", KIB)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = Cache(tmp_path, 4 * KIB)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ShardError, match=r"cache .*No space left on device; name .*or lower data\.cache_gb"):
        get(store, "a", KIB)
    assert held(tmp_path) == 0


def test_a_fork_does_not_keep_its_parents_locks(tmp_path):
    """The parent is killed in mid-download; its worker lives on, and the room is free all the same."""
    store = Cache(tmp_path, 4 * KIB)
    ready, done = get_context("fork").Event(), get_context("fork").Event()

    def worker() -> None:
        ready.set()
        done.wait(30)

    def parent() -> None:
        def fill(part) -> None:
            part.write(b"x")
            if not os.fork():  # not a process of multiprocessing: it must outlive its parent
                worker()
                os._exit(0)
            time.sleep(60)

        store.open("a", 4 * KIB, fill)

    process = get_context("fork").Process(target=parent)
    process.start()
    assert ready.wait(20)
    process.kill()
    process.join()
    begin = time.monotonic()
    assert get(store, "b", 4 * KIB) == content("b", 4 * KIB)
    assert time.monotonic() - begin < 5
    done.set()


NAMES, LIMIT = 12, 400 * KIB


def size_of(number: int) -> int:
    return (40 + 10 * (number % 5)) * KIB


def use(folder: Path, worker: int, rounds: int) -> None:
    """Read files in an order of its own, each checked in full."""
    store = Cache(folder, LIMIT)
    for turn in range(rounds):
        number = hash64("use", worker, turn) % NAMES
        name, size = f"file{number}", size_of(number)
        length = None if number == 0 else size  # one is of unknown length
        with store.open(name, length, filler(name, size, pieces=8, pause=0.001)) as file:
            assert file.read() == content(name, size)


def fall(folder: Path, worker: int) -> None:
    """Work as the others do, then begin a download that never ends."""
    use(folder, worker, 10)
    Cache(folder, LIMIT).open(f"victim{worker}", 60 * KIB, filler("x", 60 * KIB, pieces=60, pause=1)).close()


def test_the_bound_holds_with_four_processes_and_two_kills(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "STEP", 16 * KIB)
    fork = get_context("fork")
    store = Cache(tmp_path, LIMIT)
    victims = [fork.Process(target=fall, args=(tmp_path, n)) for n in range(2)]
    others = [fork.Process(target=use, args=(tmp_path, n, 60)) for n in range(2, 4)]
    for worker in (*victims, *others):
        worker.start()
    highest, begin = 0, time.monotonic()
    while any(worker.is_alive() for worker in (*victims, *others)):
        highest = max(highest, held(tmp_path))
        for path in tmp_path.glob("file?"):  # a final name is only ever on a whole file
            if (file := store.find(path.name)) is not None:
                with file:
                    assert file.read() == content(path.name, size_of(int(path.name[4:])))
        for number, victim in enumerate(victims):
            if victim.is_alive() and (tmp_path / f"victim{number}.part").exists():
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
        assert time.monotonic() - begin < 60
    assert [worker.exitcode for worker in victims] == [-9, -9]
    assert [worker.exitcode for worker in others] == [0, 0]
    assert LIMIT // 2 < highest <= LIMIT, f"{highest} of {LIMIT} bytes"
    get(store, "all", LIMIT)  # what the victims held is free again
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["all"] and held(tmp_path) == LIMIT
