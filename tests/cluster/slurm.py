"""A real SLURM cluster on make-believe machines: `login`, with slurmctld, and the nodes n1, n2, ...

Failures are noticed in seconds, not minutes: that is all that its slurm.conf has of its own. Partition `batch` gives
way to `urgent`, with 30 s of grace.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from tests.cluster import machine
from tests.cluster.machine import Machine, until

SERVICES = ("slurmctld", "slurmd", "munged", "sbatch")
PACKAGES = "slurmctld slurmd slurm-client munge"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONF = """\
ClusterName=test
SlurmctldHost=login({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
KillWait=5
UnkillableStepTimeout=120
InactiveLimit=0
WaitTime=0
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-{nodes}] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Return why there can be no cluster here, or nothing."""
    return machine.missing(SERVICES)


class Cluster:
    """The cluster; it is up after construction. Use as a context manager, or call `down`."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        """Start it; logs and state go to `folder`, which must be on the shared disk (not under /run or /dev/shm)."""
        self.folder = folder
        for name in ("log", "state", "spool", "dev", "etc/slurm", "etc/munge", "etc/ssh/ssh_config.d"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "etc" / "munge").chmod(0o755)
        self._write_etc(nodes)
        self.login = Machine("login", 1, folder)
        self.nodes: dict[str, Machine] = {}
        try:
            self.login.run(
                "munged", "--force", f"--key-file={folder}/munge.key", "--socket=/run/munge/munge.socket.2",
                "--pid-file=/run/munge/munged.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/seed",
            )  # fmt: skip
            self.start_controller()
            for number in range(1, nodes + 1):
                self.nodes[f"n{number}"] = Machine(f"n{number}", 10 + number, folder, self.login)
                self.start_slurmd(f"n{number}")
            self.all_idle()
        except BaseException:
            self.down()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def _write_etc(self, nodes: int) -> None:
        etc = self.folder / "etc"
        hosts = [f"{machine.NETWORK}.1 login", *(f"{machine.NETWORK}.{10 + n} n{n}" for n in range(1, nodes + 1))]
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(line + "\n" for line in hosts))
        (etc / "resolv.conf").write_text("")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "slurm" / "slurm.conf").write_text(CONF.format(folder=self.folder, nodes=nodes, network=machine.NETWORK))
        for number in range(2):  # twins of /dev/null: slurmd wants GPUs to be devices
            device = self.folder / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(1, 3))
        (etc / "slurm" / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-1]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def down(self) -> None:
        """End everything."""
        for host in (*getattr(self, "nodes", {}).values(), self.login):
            host.power_cut(silent=False)

    # -- what may fail -------------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        """Start slurmctld, which finds the state that it has left."""
        self.login.run("slurmctld")

    def kill_controller(self) -> None:
        """Kill slurmctld."""
        self.login.kill("/run/slurmctld.pid", signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        self.nodes[node].run("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's slurmd; its jobs live on."""
        self.nodes[node].kill("/run/slurmd.pid", signal.SIGKILL)

    def power_on(self, node: str) -> None:
        """Boot a node again."""
        self.nodes[node].boot()
        self.start_slurmd(node)

    def idle(self) -> set[str]:
        """Return the nodes that wait for work."""
        said = self.login.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%n %t").splitlines()
        return {line.split()[0] for line in said if line.endswith("idle")}  # idle* does not answer

    def all_idle(self, seconds: float = 60) -> None:
        """Wait until all nodes are there and nothing runs."""
        until(lambda: self.idle() == set(self.nodes), seconds, lambda: self.login.run("sinfo", "-N", "-l"))

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, *words: str | Path, env: Mapping[str, str]) -> int:
        """Submit a job from the current folder and return its number."""
        return int(self.login.run("sbatch", "--parsable", *words, env=env))

    def job(self, number: int | str) -> dict[str, str]:
        """Return what scontrol says of a job."""
        said = self.login.run("scontrol", "show", "job", "-o", str(number))
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def state(self, number: int | str) -> str:
        """Return the state of a job."""
        return self.job(number)["JobState"]

    def cancel(self, *words: str) -> None:
        """Call scancel."""
        self.login.run("scancel", *words)

    def hasten(self, number: int | str) -> None:
        """Take away the two minutes that SLURM makes a requeued job wait."""
        found = self.job(number)
        waits = found.get("EligibleTime", "") > datetime.now().isoformat()  # or Unknown, of an array's record
        # a node takes a start in the second in which the last one was revoked for that one, and the job fails
        old = found.get("SubmitTime", "") < (datetime.now() - timedelta(seconds=3)).isoformat()
        if found["JobState"] == "PENDING" and waits and old and found["EligibleTime"][0].isdigit():
            subprocess.run(  # the job may have started in between
                self.login.words("scontrol", "update", f"JobId={number}", "StartTime=now"), capture_output=True
            )

    def restarted(self, number: int | str, times: int, seconds: float = 90) -> dict[str, str]:
        """Wait until a job has been started again for the `times`-th time and runs; return what scontrol says."""

        def there() -> bool:
            found = self.job(number)
            if found["JobState"] in OVER:
                raise AssertionError(f"job {number} ended as {found}")
            self.hasten(number)
            return int(found["Restarts"]) >= times and found["JobState"] == "RUNNING"

        until(there, seconds, lambda: str(self.job(number)))
        return self.job(number)

    def ended(self, number: int | str, seconds: float = 180, tell: Callable[[], str] = str) -> dict[str, str]:
        """Wait until a job is over, hastening requeued starts; return what scontrol says."""

        def over() -> bool:
            self.hasten(number)
            return self.state(number) in OVER

        until(over, seconds, lambda: f"{self.job(number)}\n{tell()}")
        return self.job(number)

    def first_node(self, number: int | str) -> str:
        """Return the node on which the batch script of a job runs."""
        return self.job(number)["BatchHost"]

    def ranks(self, node: str, number: int | str) -> dict[int, int]:
        """Return the processes on a node that train for a job: rank -> pid outside."""
        found: dict[int, int] = {}
        for pid in self.nodes[node].processes():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            rank = next((int(v[13:]) for v in variables if re.fullmatch(rb"SLURM_PROCID=\d+", v)), None)
            trains = (
                re.search(rb"(pretrain|finetune)/main\.py\0", words) and b"SLURM_JOB_ID=%d" % int(number) in variables
            )
            if trains and rank is not None and any(v.startswith(b"SLURM_STEP_NUM_TASKS=") for v in variables):
                found.setdefault(rank, pid)  # the youngest are its loader's workers
        return found
