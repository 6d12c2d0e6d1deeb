"""Run a command on every node and hand back what each printed: here, by srun in a SLURM job, or by ssh."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from typing import Any, NamedTuple, Sequence

from launcher import world
from launcher.job import ROOT

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"
FORWARDED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "DS_ACCELERATOR", "OMP_NUM_THREADS")


class Said(NamedTuple):
    """What came back."""

    host: str  #: "" where one command (srun) spoke for all
    code: int
    out: str
    error: str


class Nodes(NamedTuple):
    """The nodes, and how they are reached."""

    hosts: tuple[str, ...]
    how: str  #: local, srun or ssh
    ssh: str = SSH

    def each(
        self,
        words: Sequence[Sequence[str]],
        *,
        seconds: float,
        env: Sequence[dict[str, str]] = (),
        grace: float = 0,
    ) -> list[Said]:
        """Run words[i] on host i, all at once; by srun the first is run on every node, which finds its own index.

        With `grace` the others are given so many seconds when one has failed, as they may be waiting for it.
        """
        envs = env or [{}] * len(self.hosts)
        if self.how == "srun":
            commands = [self._srun(1, words[0])]
            return self._together([""], commands, [envs[0]], seconds, 0)
        commands = [
            list(w) if self.how == "local" else self._remote(host, w, e) for host, w, e in zip(self.hosts, words, envs)
        ]
        return self._together(self.hosts, commands, envs, seconds, grace)

    def srun_ranks(self, each: int, words: Sequence[str], *, seconds: float, env: dict[str, str]) -> list[Said]:
        """Run words as `each` ranks on every node of the SLURM job."""
        return self._together([""], [self._srun(each, words)], [env], seconds, 0)

    def _srun(self, each: int, words: Sequence[str]) -> list[str]:
        count = len(self.hosts)
        start = ["srun", f"--nodes={count}", f"--ntasks={count * each}", f"--ntasks-per-node={each}", "--overlap"]
        # a node that fails must not silence the others; ranks of a sum wait for each other
        wait = "--wait=15" if each > 1 else "--wait=0"
        return [*start, "--kill-on-bad-exit=0", wait, *words]

    def _remote(self, host: str, words: Sequence[str], env: dict[str, str]) -> list[str]:
        """ssh hands the remote shell one string, and none of the variables here."""
        given = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        pairs = [f"{name}={value}" for name, value in {**given, "PYTHONPATH": ROOT, **env}.items()]
        line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*pairs, *words])}"
        return [*shlex.split(self.ssh), host, line]

    def _together(
        self,
        hosts: Sequence[str],
        commands: Sequence[list[str]],
        envs: Sequence[dict[str, str]],
        seconds: float,
        grace: float,
    ) -> list[Said]:
        said: list[Any] = [None] * len(commands)
        until = [time.monotonic() + seconds]  # one for all: it comes closer when one has failed

        def one(at: int) -> None:
            here = {**world.outside(os.environ), "PYTHONPATH": _with_root(), **envs[at]}
            try:
                child = subprocess.Popen(
                    commands[at],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    env=here,
                )
            except OSError as error:
                said[at] = Said(hosts[at], 127, "", str(error))
                return
            late = ""
            while True:
                try:
                    out, error_text = child.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > until[0]:
                        child.kill()
                        late = f"\nno answer after {seconds:.0f} s, or so long after another had failed"
            said[at] = Said(hosts[at], child.returncode, out, error_text + late)
            if child.returncode and grace:
                until[0] = min(until[0], time.monotonic() + grace)

        threads = [threading.Thread(target=one, args=(at,)) for at in range(len(commands))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said


def _with_root() -> str:
    return os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
