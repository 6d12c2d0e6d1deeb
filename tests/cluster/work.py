"""A job of the batch scripts on the test cluster: how far it has come, its processes, what it has said."""

import os
import re
import signal
import sys
from pathlib import Path

from tests.cluster.machine import until
from tests.cluster.slurm import Cluster
from tests.end_to_end.jobs import steps_done

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Return what a user's shell would have: which Python, and that there is no GPU."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


class Work:
    """One job. `run` is the folder of its run."""

    def __init__(self, cluster: Cluster, run: Path, *words: str | Path, **env: str) -> None:
        """Submit: sbatch's options, a script of slurm/, and its words; `env` beyond a user's shell."""
        self.cluster, self.run = cluster, run
        self.number = cluster.submit(f"--output={cluster.folder}/log/job-%j.out", *words, env={**environment(), **env})

    def log(self) -> str:
        """Return what the job has printed."""
        path = self.cluster.folder / "log" / f"job-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self, pattern: str, seconds: float = 90) -> None:
        """Wait until the log has a line like this."""
        until(lambda: re.search(pattern, self.log()), seconds, lambda: f"no {pattern!r} in\n{self.log()[-5000:]}")

    def step(self) -> int:
        """Return the last step that the run has reported."""
        return steps_done(self.run)

    def at(self, step: int, seconds: float = 120) -> int:
        """Wait until the run has come to a step; return the step that its newest checkpoint has."""
        until(lambda: self.step() >= step, seconds, lambda: f"step {self.step()}, not {step}\n{self.log()[-5000:]}")
        return self.saved()

    def saved(self) -> int:
        """Return the step of the newest checkpoint, 0 where there is none."""
        latest = self.run / "checkpoints" / "latest"
        return int(latest.read_text().strip()[5:]) if latest.exists() else 0

    def resumed(self) -> list[int]:
        """Return the steps at which the starts after the first have gone on."""
        return [int(step) for step in re.findall(r"resumed from \S+: (\d+) of", self.log())]

    def restarted(self, times: int, seconds: float = 90) -> None:
        """Wait until SLURM has started the job again for so many times."""
        try:
            self.cluster.restarted(self.number, times, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-5000:]}") from error

    def ended(self, state: str, seconds: float = 240) -> None:
        """Wait until the job is over, as it should."""
        found = self.cluster.ended(self.number, seconds, lambda: self.log()[-5000:])
        assert found["JobState"] == state, f"{found}\n{self.log()[-5000:]}"

    @property
    def nodes(self) -> list[str]:
        """The nodes, the one with the batch script first."""
        found = self.cluster.job(self.number)
        names = self.cluster.login.run("scontrol", "show", "hostnames", found["NodeList"]).split()
        return [found["BatchHost"], *(name for name in names if name != found["BatchHost"])]

    def ranks(self, node: str) -> list[int]:
        """Return the processes on a node that train."""
        return sorted(self.cluster.ranks(node, self.number).values())

    def supervisor(self, node: str) -> int:
        """Return the process that watches over the ranks."""
        for pid in self.cluster.nodes[node].processes():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"launcher" in words and f"SLURM_JOB_ID={self.number}".encode() in variables(pid):
                return pid
        raise AssertionError(f"no launcher on {node}\n{self.log()[-5000:]}")


def variables(pid: int) -> list[bytes]:
    """Return the environment of a process."""
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes."""
    assert pids, "there is nobody"
    for pid in pids:
        os.kill(pid, number)
