"""Secure shell between the machines of a test cluster, with keys of its own; root's are not looked at."""

import shutil
import subprocess

from tests.cluster.slurm import Cluster

SERVICES = ("sshd", "ssh-keygen", "pdsh")
PACKAGES = "openssh-server pdsh"

SERVER = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile /run/sshd.pid
"""
CLIENT = """\
Host login n*
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str:
    """Return why there can be no ssh here, or nothing."""
    absent = [name for name in SERVICES if not shutil.which(name, path="/usr/sbin:/usr/bin:/bin")]
    return f"not installed: {', '.join(absent)}" if absent else ""


def start(cluster: Cluster) -> None:
    """Start a server on every node."""
    folder = cluster.folder
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    # covers /etc/ssh/ssh_config.d on every machine: see init.sh
    (folder / "etc" / "ssh" / "ssh_config.d" / "cluster.conf").write_text(CLIENT.format(folder=folder))
    for node in cluster.nodes.values():
        node.run("/usr/sbin/sshd", "-f", folder / "sshd_config", "-E", folder / "log" / f"sshd.{node.name}.log")
