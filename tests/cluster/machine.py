"""Make-believe machines: a process tree each, with its own network card, hostname, processes, /run and /dev/shm.

The rest of the file system is common to all: their shared disk. The first machine holds the switch that the cables of
the others lead to, so that nothing of it is in the real machine's network. A machine ends when its starter does.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

INIT = Path(__file__).with_name("init.sh")
NETWORK = "10.77.0"
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")


def missing(tools: Sequence[str] = ()) -> str:
    """Return why machines cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "machines in namespaces need root"
    absent = [tool for tool in (*TOOLS, *tools) if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-f", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here ({tried.stderr.strip()})" if tried.returncode else ""


def until(true: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: it was not for so long; the message says `what`.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


class Machine:
    """One machine; it is on after construction."""

    def __init__(self, name: str, number: int, folder: Path, switch: "Machine | None" = None) -> None:
        """Boot; names in `folder`/etc cover those of /etc, `folder`/log is for the boot; a cable leads to `switch`."""
        self.name, self.number, self.folder, self.switch = name, number, folder, switch
        self.address = f"{NETWORK}.{number}"
        self.boot()

    def boot(self) -> None:
        """Turn the machine on."""
        with open(self.folder / "log" / f"boot.{self.name}.log", "ab") as log:
            self._starter = subprocess.Popen(
                ["unshare", "-n", "-u", "-m", "-p", "-f", "--mount-proc", INIT, self.name, self.folder / "etc"],
                stdin=subprocess.PIPE,  # never written to: it closes with this process
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the tests
            )
        children = Path(f"/proc/{self._starter.pid}/task/{self._starter.pid}/children")
        until(lambda: children.exists() and children.read_text().split(), 20, f"{self.name} has no first process")
        self.pid = int(children.read_text().split()[0])
        until(lambda: self._enter("test", "-e", "/run/ready").returncode == 0, 20, f"{self.name} has not booted")
        if self.switch is None:
            self.run("ip", "link", "add", "switch", "type", "bridge")
            self.run("ip", "addr", "add", f"{self.address}/24", "dev", "switch")
            self.run("ip", "link", "set", "switch", "up")
        else:
            # from outside the switch's processes: only there does this machine's pid name it
            into = ["nsenter", "-t", str(self.switch.pid), "-n"]
            # after a power cut the kernel takes its time to tear the old cable down
            subprocess.run([*into, "ip", "link", "delete", self.name], capture_output=True)
            plug = ["ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid)]
            subprocess.run([*into, *plug], check=True)
            self.switch.run("ip", "link", "set", self.name, "master", "switch", "up")
            self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
            self.run("ip", "link", "set", "eth0", "up")

    @property
    def on(self) -> bool:
        """Whether the machine runs."""
        return self._starter.poll() is None

    def words(self, *command: str | Path) -> list[str]:
        """Return the command line that runs a command in here, in the current folder."""
        return [
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            "-u",
            "-m",
            "-p",
            f"--wdns={Path.cwd()}",
            "--",
            *map(str, command),
        ]

    def _enter(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.words(*command), capture_output=True, text=True)

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
        """Run a command in here and return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(self.words(*command), capture_output=True, text=True, env=env, timeout=timeout)
        assert done.returncode == 0, f"{self.name}: {' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill(self, pid_file: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the service whose pid is in a file of this machine, and wait until it is gone."""
        pid = self.run("cat", pid_file).strip()
        self.run("kill", f"-{number.value}", pid)
        until(lambda: self._enter("kill", "-0", pid).returncode, 20, f"{pid_file} of {self.name} is still there")

    def processes(self) -> list[int]:
        """Return all processes in here, by their numbers outside."""
        space, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.readlink(entry / "ns" / "pid") == space:
                        found.append(int(entry.name))
                except OSError:
                    continue
        return sorted(found)

    def unplug(self) -> None:
        """Pull the network cable: silence, no closed connection."""
        assert self.switch is not None
        self.switch.run("ip", "link", "set", self.name, "down")

    def plug(self) -> None:
        """Put the cable back."""
        assert self.switch is not None
        self.switch.run("ip", "link", "set", self.name, "up")

    def power_cut(self, *, silent: bool = True) -> None:
        """Turn it off at once. The kernel, which all machines share, would say goodbye for it unless it is `silent`."""
        if silent and self.switch is not None:
            self.unplug()
        if self.on:
            os.kill(self.pid, signal.SIGKILL)
        self._starter.wait(timeout=60)  # for all its processes
        self._starter.stdin.close()
