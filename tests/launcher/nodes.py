"""Two "nodes" for doctor: network namespaces of this machine with a cable between them, reached as if by ssh."""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from types import TracebackType

HEAD, OTHER = "10.78.0.1", "10.78.0.2"  # only inside the namespaces


def unavailable() -> str:
    """Return why there can be none here, "" where there can."""
    if os.geteuid() != 0:
        return "two nodes are two network namespaces, which need root"
    for tool in ("ip", "unshare", "mount"):
        if not shutil.which(tool):
            return f"two nodes need `{tool}` (Debian: iproute2, util-linux)"
    name = f"diptych-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Nodes:
    """Two namespaces; as a context, they are gone after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {HEAD: f"diptych-{os.getpid()}-a", OTHER: f"diptych-{os.getpid()}-b"}
        self.before = {HEAD: "", OTHER: ""}  #: shell that a node runs before each command

    def __enter__(self) -> "Nodes":
        a, b = self.names.values()
        for name in (a, b):
            _ip("netns", "add", name)
        _ip("-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for address, name in self.names.items():
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for card in ("eth0", "lo"):
                _ip("-n", name, "link", "set", card, "up")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def hostfile(self) -> str:
        path = self.folder / "hosts"
        path.write_text(f"{HEAD} slots=1\n{OTHER} slots=1\n")
        return str(path)

    def shell(self) -> str:
        """Return the command that stands for ssh: it takes a host and a line for its shell."""
        path = self.folder / "enter"
        cases = "".join(
            f"  {address}) name={name}; before={_quoted(self.before[address])} ;;\n"
            for address, name in self.names.items()
        )
        # a mount namespace of its own: what is mounted on one node is not on the other
        path.write_text(
            f"#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}esac\n"
            'exec ip netns exec "$name" unshare --mount sh -c "$before\n$*"\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def run(self, address: str, *words: str) -> None:
        """Run a command on a node."""
        subprocess.run(["ip", "netns", "exec", self.names[address], *words], check=True, capture_output=True, text=True)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
