"""doctor on a real SLURM cluster: by salloc from the login machine, and by srun in a job; what is wrong has a name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster
from tests.cluster.work import environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_cluster")]
PORT = 23457


def doctor(cluster: Cluster, folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Return exit code and output of doctor on two nodes, as started on the login machine."""
    line = (
        sys.executable, "-m", "launcher", "doctor", "--nodes", "2", "--sbatch=--nodelist=n1,n2", "--sbatch=--quiet",
        "--folder", str(folder), "--need-gib", "0", "--port", str(PORT), "--seconds", "8", *words,
    )  # fmt: skip
    env = {**environment(), **variables}
    done = subprocess.run(cluster.login.words(*line), capture_output=True, text=True, env=env, timeout=240)
    return done.returncode, done.stdout + done.stderr


def wrong(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("WRONG")]


def test_good_nodes_and_a_sum_over_the_network(cluster: Cluster, tmp_path: Path) -> None:
    code, text = doctor(cluster, tmp_path, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # as if a rank had started it
    assert code == 0, text
    assert "2 node(s) by srun: n1, n2" in text
    assert "network: ports open" in text and "all-reduce: 2 ranks" in text


def test_a_closed_port(cluster: Cluster, tmp_path: Path) -> None:
    rule = ("ipproto", "tcp", "dport", str(PORT), "prohibit", "priority", "1")
    node = cluster.nodes["n2"]
    closed = subprocess.run(node.words("ip", "rule", "add", *rule), capture_output=True, text=True)
    if closed.returncode:
        pytest.skip(f"this kernel cannot close a port by a rule: {closed.stderr.strip()}")
    try:
        code, text = doctor(cluster, tmp_path)
    finally:
        node.run("ip", "rule", "del", *rule)
    assert code == 1
    (line,) = wrong(text)
    assert f"port: n2 cannot reach n1 (10.77.0.11) at port {PORT}" in line


def test_a_folder_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.nodes["n2"]
    node.run("mount", "-t", "tmpfs", "none", tmp_path)
    try:
        code, text = doctor(cluster, tmp_path, "--no-all-reduce")
    finally:
        node.run("umount", tmp_path)
    assert code == 1
    (line,) = wrong(text)
    assert f"folder: n2 does not see in {tmp_path} what n1 has written there" in line


def test_a_full_disk(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.nodes["n2"]
    node.run("mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path)
    try:
        subprocess.run(node.words("dd", "if=/dev/zero", f"of={tmp_path}/full", "bs=1M", "count=1"), capture_output=True)
        code, text = doctor(cluster, tmp_path, "--no-all-reduce")
    finally:
        node.run("umount", tmp_path)
    assert code == 1
    assert f"disk: n2: 1 MiB cannot be written to {tmp_path} (ENOSPC" in wrong(text)[0]


def test_a_wrong_interface_and_an_unlike_version(cluster: Cluster, tmp_path: Path) -> None:
    info = tmp_path / "torch-9.9.dist-info"  # one path, but another environment behind it on n2
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$(hostname)" != n2 ] || export PYTHONPATH={tmp_path}:$PYTHONPATH\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    code, text = doctor(cluster, tmp_path, "--no-all-reduce", "--python", str(python), GLOO_SOCKET_IFNAME="ib0")
    assert code == 1
    found = "\n".join(wrong(text))
    assert "interface: n1: GLOO_SOCKET_IFNAME=ib0, but no such interface" in found
    assert "interface: n2: GLOO_SOCKET_IFNAME=ib0" in found and "set GLOO_SOCKET_IFNAME=eth0" in found
    assert "version: torch is" in found and "9.9 on n2" in found
