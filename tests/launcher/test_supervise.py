"""Runs that end in every way are judged, started again, or stopped; with real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher import run_folder
from launcher.supervise import LAUNCH, Supervisor
from launcher.verdict import Policy

STAND_IN = Path(__file__).with_name("stand_in.py")
ROOT = STAND_IN.parent.parent.parent


def supervisor(run: Path, *what: str, steps: int = 20, **given: object) -> Supervisor:
    words = [sys.executable, "-I", "-S", str(STAND_IN), str(run), str(steps), *what]
    policy = Policy(same_step=3, no_progress=4, first_wait=0.01)
    env = {**os.environ, LAUNCH: "ours"}
    return Supervisor(**{"start": lambda attempt: words, "env": env, "run": str(run), "policy": policy, **given})


def starts(run: Path) -> int:
    return len((run / "starts").read_text().split())


def ends(run: Path) -> list[tuple[str, int]]:
    return [(line["verdict"], line["code"]) for line in run_folder.launches(str(run)) if line["event"] == "end"]


def test_a_run_that_crashes_goes_on_to_its_end(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "7:SIGKILL", "12:1", "18:stop", "0:").supervise() == 0
    assert ends(tmp_path) == [("crashed", 137), ("crashed", 1), ("again", 85), ("done", 0)]
    assert run_folder.progress(str(tmp_path)).finished


def test_a_mistake_is_not_repeated(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "1:2").supervise() == 2
    assert starts(tmp_path) == 1


def test_a_crash_at_the_same_step_is_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert supervisor(tmp_path, "7:1").supervise() == 1
    assert starts(tmp_path) == 3
    assert "not started again: it failed 3 times at step 7" in capsys.readouterr().err


def test_failing_at_changing_steps_without_a_save_is_one_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert supervisor(tmp_path, "6:1", "7:1", "8:1", "9:1", "0:").supervise() == 1
    assert starts(tmp_path) == 4
    assert "4 times without a checkpoint after step 5" in capsys.readouterr().err


def test_one_that_fails_before_it_has_a_folder_is_stopped_and_leaves_no_record(tmp_path: Path) -> None:
    assert supervisor(tmp_path / "run", "-1:1").supervise() == 1
    assert starts(tmp_path / "run") == 3
    assert not (tmp_path / "run" / run_folder.RECORD).exists()


def test_the_count_survives_the_queue_but_not_a_person(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "7:1", policy=Policy(2, 9, 0.01)).supervise() == 1
    assert supervisor(tmp_path, "7:1", policy=Policy(3, 9, 0.01), by_hand=False).supervise() == 1
    assert starts(tmp_path) == 3
    assert supervisor(tmp_path, "7:1", policy=Policy(2, 9, 0.01)).supervise() == 1
    assert starts(tmp_path) == 5


def test_a_command_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert supervisor(tmp_path, start=lambda attempt: ["/no/such/python"]).supervise() == 127
    assert "cannot be started" in capsys.readouterr().err


def later(run: Path, *numbers: int) -> None:
    """Send signals to this process once the run has reached step 7, where it hangs."""

    def send() -> None:
        while run_folder.progress(str(run)).step < 7:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_run_which_saves(tmp_path: Path, number: int, code: int) -> None:
    later(tmp_path, number)
    assert supervisor(tmp_path, "7:hang").supervise() == code
    assert starts(tmp_path) == 1
    assert run_folder.progress(str(tmp_path)).saved == 7
    assert supervisor(tmp_path, "7:hang").supervise() == 0  # the same command goes on


def test_a_signal_between_two_starts_ends_the_wait(tmp_path: Path) -> None:
    later(tmp_path, signal.SIGTERM)
    began = time.monotonic()
    assert supervisor(tmp_path, "7:1", policy=Policy(3, 9, 60)).supervise() == 85
    assert time.monotonic() - began < 30


def test_ranks_below_a_launcher_that_dies_of_signals_are_reached(tmp_path: Path) -> None:
    # as deepspeed and torchrun do: it has no handler for USR1, its child is the rank
    launcher = (
        "import os, subprocess, sys\n"
        "sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, 'LOCAL_RANK': '0'}).returncode)"
    )
    made = supervisor(tmp_path, "7:hang")
    words = made.start(0)
    made.start = lambda attempt: [sys.executable, "-I", "-S", "-c", launcher, *words]
    later(tmp_path, signal.SIGUSR1)
    assert made.supervise() == 85
    assert run_folder.progress(str(tmp_path)).saved == 7


def test_a_launcher_that_loses_the_code_does_not_lose_the_verdict(tmp_path: Path) -> None:
    made = supervisor(tmp_path, "7:stop", "0:")  # torchrun ends with 1 whatever its ranks ended with
    words = made.start(0)
    lossy = "import subprocess, sys; sys.exit(bool(subprocess.run(sys.argv[1:]).returncode))"
    made.start = lambda attempt: [sys.executable, "-I", "-S", "-c", lossy, *words]
    assert made.supervise() == 0
    assert ends(tmp_path) == [("again", 1), ("done", 0)]


def test_a_launcher_whose_run_was_taken_over_ends_it_and_writes_nothing(tmp_path: Path) -> None:
    def take_over() -> None:
        while not (tmp_path / run_folder.RECORD).exists():
            time.sleep(0.01)
        (tmp_path / "environment.json").write_text(json.dumps({"launch": "theirs"}))

    threading.Thread(target=take_over, daemon=True).start()
    assert supervisor(tmp_path, "7:hang").supervise() == 1
    assert starts(tmp_path) == 1
    assert ends(tmp_path) == []


@pytest.mark.parametrize(("before", "stale"), [("earlier", True), ("theirs", False), (None, False)])
def test_a_run_taken_over_and_lost_between_two_looks_is_lost(tmp_path: Path, before: str | None, stale: bool) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"launch": "theirs"}))
    made = supervisor(tmp_path)
    made._before = before  # None: the disk did not say
    made._look(None)
    assert made._stale == stale


def test_a_disk_that_hiccups_has_not_given_the_run_away(tmp_path: Path) -> None:
    def hiccup() -> None:
        while not (tmp_path / run_folder.RECORD).exists():
            time.sleep(0.01)
        (tmp_path / "environment.json").rename(tmp_path / "away")
        time.sleep(2.5)  # longer than between two looks
        (tmp_path / "away").rename(tmp_path / "environment.json")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=hiccup, daemon=True).start()
    assert supervisor(tmp_path, "7:hang").supervise() == 85
    assert ends(tmp_path) == [("stopped", 85)]


def test_a_disk_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launcher.run_folder.record", full)
    assert supervisor(tmp_path, "7:1", "0:").supervise() == 0
    assert starts(tmp_path) == 2 and "record was not written: [Errno 28]" in capsys.readouterr().err


def test_a_zero_of_deepspeed_whose_child_was_killed_is_not_believed(tmp_path: Path) -> None:
    assert supervisor(tmp_path, "7:0", "0:", kind="deepspeed").supervise() == 0
    assert ends(tmp_path) == [("crashed", 0), ("done", 0)]


SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo "JobId=7 JobState=$(cat "$STATE") Restarts=0 NodeList=n1"; else echo "$@" >> {told}; fi
"""


def in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, *, srun: int = 0) -> Path:
    """Stand in for SLURM's commands (test_slurm.py has the real ones); return what scontrol is told."""
    told = tmp_path / "told"
    (tmp_path / "state").write_text(state)
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    scripts = {
        "scontrol": SCONTROL.format(told=told),
        "srun": f"#!/bin/sh\necho Node failure >&2\nexit {srun}\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return told


@pytest.mark.parametrize(("state", "told"), [("RUNNING", "requeue 7\n"), ("COMPLETING", "")])
def test_in_a_job_what_was_saved_goes_back_to_the_queue_unless_it_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, told: str
) -> None:
    asked = in_a_job(tmp_path, monkeypatch, state)
    assert supervisor(tmp_path / "run", "7:stop", slurm_job="7").supervise() == 85
    assert (asked.read_text() if asked.exists() else "") == told


def test_in_a_job_a_crash_is_started_again_here_while_all_nodes_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = in_a_job(tmp_path, monkeypatch, "RUNNING")
    assert supervisor(tmp_path / "run", "7:SIGKILL", "0:", slurm_job="7").supervise() == 0
    assert not asked.exists()


def test_in_a_job_a_silent_node_sends_it_back_to_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_a_job(tmp_path, monkeypatch, "RUNNING", srun=1)
    assert supervisor(tmp_path / "run", "7:SIGKILL", "0:", slurm_job="7").supervise() == 85
    assert asked.read_text() == "requeue 7\n"
    assert starts(tmp_path / "run") == 1


def test_nothing_outlives_a_launcher_that_was_told_to_kill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.launcher.test_supervise import supervisor\n"
        "made = supervisor(Path(sys.argv[2]), '7:hang')\n"
        "words = made.start(0)\n"
        "deaf = 'import pathlib, signal, sys, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 10, 15)];'\n"
        "deaf += 'pathlib.Path(sys.argv[1]).touch(); time.sleep(60)'\n"
        "made.start = lambda attempt: [sys.executable, '-I', '-S', '-c', deaf, sys.argv[2] + '/deaf']\n"
        "sys.exit(made.supervise())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while not (tmp_path / "deaf").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    for _ in range(3):
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
    said = child.communicate(timeout=20)[1]
    assert child.returncode == 130, said
    assert "third Ctrl-C" in said
