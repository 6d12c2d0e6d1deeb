"""Put a job back into the queue: patiently while the controller is away, and only the start that still has the job.

A node that was cut off from the others may wake up when SLURM has long given its job to other nodes: queued again by
the old start, the new one would end.
"""

from __future__ import annotations

import os
import time
from typing import Callable, Mapping

from launcher import slurm

PATIENCE = 600.0  #: seconds that a dead controller has to come back
PAUSE = 5.0
AWAY = ("contact slurm controller", "has not answered", "Socket timed out", "Connection refused")


def own_job(env: Mapping[str, str]) -> str:
    """Return the name of the job that this process is in, "" where it is in none.

    A task of an array has a number of its own, but the last one to start has that of the whole array: by that number
    all tasks would be queued again.
    """
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return env["SLURM_ARRAY_JOB_ID"] + "_" + env["SLURM_ARRAY_TASK_ID"]
    return env.get("SLURM_JOB_ID", "")


def requeue(job: str, say: Callable[[str], None], *, patience: float = PATIENCE, pause: float = PAUSE) -> str:
    """Queue a running job again; return "", or the reason why it is not.

    `say` gets the news that the controller is away.
    """
    until, told = time.monotonic() + patience, False
    while True:
        try:
            refused = _refused(job)
            if not refused:
                slurm.requeue(job)
            return refused
        except slurm.SlurmError as error:
            away = any(words in str(error) for words in AWAY)
            if not away or time.monotonic() > until:
                return f"{error}; submit it again and the run goes on from its checkpoint"
            if not told:
                say(f"{error}; trying for {patience / 60:.0f} minutes")
            told = True
        time.sleep(pause)


def _refused(job: str) -> str:
    found = slurm.record(job)
    state = found.get("JobState", "GONE")
    if state != "RUNNING":  # cancelled, or SLURM has queued it already: it must not rise twice
        return f"the job is {state}, not RUNNING"
    nodes = os.environ.get("SLURM_JOB_NODELIST", found["NodeList"])
    if nodes != found["NodeList"]:
        return f"it runs on {found['NodeList']} now, no longer on {nodes}"
    # fewer than ours where a controller was killed before it had saved the last restart
    later = int(found.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return f"it has been started again since ({found['Restarts']} restarts)" if later else ""
