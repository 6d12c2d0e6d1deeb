"""A hang is named: the rank, where it is, its last collective; and ended so that the same command goes on."""

import itertools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from pretrain.engine import watchdog
from pretrain.engine.blame import Sign, verdict
from pretrain.engine.preemption import EXIT_REQUEUE
from pretrain.engine.run_folder import RunFolder
from tests.pretrain.engine import tiny_run
from tests.pretrain.engine.test_trainer import start

QUICK = ["watchdog.seconds=2", "watchdog.data_seconds=2", "train.steps=12"]


def hang(folder: str, where: str, *words: str) -> tuple:
    """The last rank hangs in its sixth step: asleep in `where`, or stopped as SIGSTOP does."""
    from pretrain import dist
    from tests.pretrain.engine import tiny_module

    steps = 0
    batch = tiny_module.batch

    def made(step: int, rank: int, world: int, size: int = 8) -> object:
        nonlocal steps
        steps += 1
        if steps == 6 and dist.rank() == dist.world() - 1:
            if where == "data":
                asleep()
            if where == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        return batch(step, rank, world, size)

    forward = tiny_module.Tiny.forward

    def slow(self: object, batches: list) -> object:
        if steps == 6 and where == "forward" and dist.rank() == dist.world() - 1:
            asleep()
        return forward(self, batches)

    tiny_module.batch, tiny_module.Tiny.forward = made, slow
    return tiny_run.run(folder, *words)


def asleep() -> None:
    """Where the stacks must point."""
    time.sleep(600)


@pytest.mark.parametrize("where", ["data", "forward"])
def test_the_rank_that_hangs_is_named_and_the_run_ends(ranks, tmp_path, where):
    with pytest.raises(AssertionError) as error:
        ranks.run(2, hang, str(tmp_path), where, *QUICK)
    said = str(error.value)
    assert f"died with {EXIT_REQUEUE}" in said
    assert "hang: rank 1 on " in said and f"is in {where} of step 6 for" in said
    assert "last collective: gloo:all_reduce number" in said or "last collective: number" in said  # before torch 2.8
    assert "in asleep" in (tmp_path / "hang/rank-00001.txt").read_text()
    line = json.loads((tmp_path / "faults.jsonl").read_text())
    assert (line["what"], line["ranks"], line["step"]) == ("hang", [1], 6)
    assert ranks.run(2, tiny_run.run, str(tmp_path), "train.steps=12")[0][0] == 0


@pytest.mark.slow
@pytest.mark.soak
def test_at_the_default_settings_a_hang_is_named_within_a_minute(tmp_path):
    """Under the real launcher; the limit is 40 s for steps that are quicker than 4."""
    process = start(tmp_path, "hang_at=20", launcher=True)
    said = ""
    named = 0.0
    for line in process.stdout:
        named = named or (time.time() if "hang: rank 1 on " in line else 0.0)
        said += line
    assert process.wait(timeout=60) == EXIT_REQUEUE, said
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 and "is in forward of step 21 for" in said and "last collective: " in said, said
    assert named - last["time"] < 60, f"{named - last['time']:.1f} s"
    assert "in asleep" in (tmp_path / "hang/rank-00001.txt").read_text()


def test_a_stopped_rank_is_named_by_the_others(ranks, tmp_path):
    stop = threading.Thread(target=wake, args=(tmp_path,))
    stop.start()
    with pytest.raises(AssertionError) as error:
        ranks.run(2, hang, str(tmp_path), "stopped", "pause=0.1", *QUICK)
    stop.join()
    said = str(error.value)
    assert re.search(r"hang: rank 1 on .* gives no sign of life and was last in \w+ of step [56]", said), said


def wake(folder: Path) -> None:
    """End the stopped rank once it has been named."""
    deadline = time.monotonic() + 60
    while not (folder / "faults.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    for child in psutil.Process().children(recursive=True):
        if child.status() == psutil.STATUS_STOPPED:
            child.kill()


def test_slow_first_steps_evals_and_saves_are_no_hang(ranks, tmp_path):
    words = ["watchdog.seconds=0.3", "train.steps=5", "pause=0.1", "slow_start=1", "slow_hook=1"]
    assert ranks.run(2, tiny_run.run, str(tmp_path), *words)[0][0] == 0
    assert not (tmp_path / "hang").exists()


def test_a_slow_rank_is_reported(ranks, tmp_path):
    ranks.run(2, tiny_run.run, str(tmp_path), "slow_rank=0.05", "monitor.log_every=4")
    assert "step 8: rank 1 on " in (text := (tmp_path / "log.txt").read_text()) and "is slow: 0.05" in text, text
    ranks.run(2, tiny_run.run, str(tmp_path / "even"), "pause=0.01", "monitor.log_every=4", "stragglers.seconds=5")
    assert "is slow" not in (tmp_path / "even/log.txt").read_text()


def sign(step: int, phase: str, *, calls: int = 5, seconds: float = 50.0) -> Sign:
    return Sign(1, step, phase, seconds, calls, "gloo:all_reduce number 5", "node7")


def test_the_one_furthest_behind_is_to_blame():
    found = verdict({0: sign(8, "forward"), 1: sign(8, "data"), 2: sign(8, "forward")}, set(), 3)
    assert found.ranks == {1} and found.phase == "data" and "rank 1 on node7 is in data of step 8" in found.sentence
    found = verdict({0: sign(8, "backward", calls=9), 1: sign(8, "backward", calls=8)}, set(), 2)
    assert found.ranks == {1}
    found = verdict({0: sign(8, "forward"), 1: sign(7, "compile"), 2: sign(7, "compile")}, set(), 3)
    assert found.ranks == {1, 2} and "(ranks 2 as well)" in found.sentence
    found = verdict({0: sign(8, "forward"), 1: sign(8, "forward")}, set(), 2)
    assert found.ranks == {0, 1} and "all ranks are in forward" in found.sentence
    found = verdict({0: sign(8, "forward"), 1: sign(8, "data")}, {1}, 3)
    assert found.ranks == {1, 2} and "rank 1 on node7 gives no sign of life" in found.sentence


def test_how_long_a_step_may_last(tmp_path):
    made = watchdog.Watchdog(watchdog.Config(), RunFolder(tmp_path))
    assert made.limit("forward") == 1800  # the first steps
    made._steps.extend([6.0, 7.0, 6.0])
    assert made.limit("forward") == 60 and made.limit("data") == 300 and made.limit("save") == 1800
    made._steps.extend([0.1] * 9)
    assert made.limit("forward") == 40


def test_time_in_which_the_process_stood_still_does_not_count(tmp_path):
    made = watchdog.Watchdog(watchdog.Config(seconds=0.4), RunFolder(tmp_path))
    ages = []
    made._look = lambda: ages.append(made._age)  # type: ignore[method-assign]
    made._phase, made._steps = "forward", made._steps.__class__([0.1] * 3)
    made._tick = 0.05
    clock = itertools.chain((0.05 * i for i in range(5)), (1000 + 0.05 * i for i in itertools.count()))
    made._clock = lambda: next(clock)  # between two ticks, the machine sleeps for 1,000 seconds
    made._thread = threading.Thread(target=made._watch)
    made._thread.start()
    time.sleep(0.25)
    assert not ages
    deadline = time.monotonic() + 20
    while not ages and time.monotonic() < deadline:
        time.sleep(0.01)
    made.close()
    assert ages[0] < 0.6


def test_a_thread_that_compiles_is_seen():
    source = "import time\ndef compile_it():\n    time.sleep(0.5)\n"
    scope: dict = {}
    exec(compile(source, "somewhere/torch/_dynamo/convert_frame.py", "exec"), scope)
    thread = threading.Thread(target=scope["compile_it"])
    thread.start()
    time.sleep(0.1)
    assert watchdog.compiling(thread.ident) and not watchdog.compiling(threading.get_ident())
    thread.join()
