"""A job goes back to the queue by the start that has it, once, and as soon as a controller answers.

Stand-ins for SLURM's commands; tests/end_to_end/test_slurm.py has the real ones, with a killed slurmctld.
"""

from pathlib import Path

import pytest

from launcher import again


def stand_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, state: str, where: str, restarts: int = 0, away: int = 0
) -> Path:
    """Put scontrol on PATH, whose first `away` calls get no answer; return where it notes what it is told to do."""
    (folder / "left").write_text("x" * away)
    script = f"""#!/bin/sh
if [ "$1" != show ]; then echo "$@" >> {folder}/told; exit; fi
left=$(cat {folder}/left)
if [ -n "$left" ]; then
  printf %s "${{left#x}}" > {folder}/left
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
echo "JobId=7 JobName=my run JobState={state} Requeue=1 Restarts={restarts} NodeList={where} BatchHost=n1"
"""
    (folder / "scontrol").write_text(script)
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return folder / "told"


def test_a_controller_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stand_in(tmp_path, monkeypatch, state="RUNNING", where="n[1-2]", away=3)
    said: list[str] = []
    assert again.requeue("7", said.append, pause=0) == ""
    assert told.read_text() == "requeue 7\n"
    assert len(said) == 1 and "Unable to contact slurm controller" in said[0]


def test_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = stand_in(tmp_path, monkeypatch, state="RUNNING", where="n[1-2]", away=3)
    assert "submit it again" in again.requeue("7", lambda line: None, patience=-1, pause=0)
    assert not told.exists()


@pytest.mark.parametrize(
    ("state", "where", "restarts", "why"),
    [
        ("COMPLETING", "n[1-2]", 1, "the job is COMPLETING, not RUNNING"),
        ("RUNNING", "n[2-3]", 2, "it runs on n[2-3] now, no longer on n[1-2]"),  # this node was cut off meanwhile
        ("RUNNING", "n[1-2]", 2, "it has been started again since (2 restarts)"),  # and given the job once more
        ("RUNNING", "n[1-2]", 0, ""),  # a controller that was killed before it had saved the restart
    ],
)
def test_a_job_that_is_no_longer_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, where: str, restarts: int, why: str
) -> None:
    told = stand_in(tmp_path, monkeypatch, state=state, where=where, restarts=restarts)
    assert again.requeue("7", lambda line: None, pause=0) == why
    assert told.exists() == (not why)


def test_a_task_of_an_array_is_not_the_array() -> None:
    task = {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "5"}
    assert again.own_job(task) == "40_5"
    assert again.own_job({"SLURM_JOB_ID": "41"}) == "41"
    assert again.own_job({}) == ""
