"""Two machines x two ranks without SLURM: deepspeed by ssh and without it, and torchrun, train as one machine does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import ssh
from tests.cluster.slurm import Cluster
from tests.cluster.work import environment
from tests.end_to_end.jobs import FEW_STEPS, losses, pretrain
from tests.end_to_end.test_pretrain import close

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multinode")


@pytest.fixture(scope="module")
def one_machine(ranks, demo_config: Path, runs: Path) -> dict[int, float]:
    """Losses of four ranks here."""
    ranks.run(4, pretrain, demo_config, "run.name=machine", f"run.dir={runs}", *FEW_STEPS)
    return losses(runs / "machine")


@pytest.fixture(scope="module")
def hostfile(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "hostfile"
    path.write_text("n1 slots=2\nn2 slots=2\n")
    return path


def everywhere(cluster: Cluster, commands: dict[str, list]) -> None:
    """Run a command on each of some nodes at once, to their ends."""
    env = environment()
    running = {
        name: subprocess.Popen(
            cluster.nodes[name].words(*words), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, words in commands.items()
    }
    said = {name: process.communicate(timeout=240)[0] for name, process in running.items()}
    assert all(process.returncode == 0 for process in running.values()), said


def program(config: Path, runs: Path, name: str) -> list:
    return ["pretrain/main.py", "--config", config, f"run.name={name}", f"run.dir={runs}", *FEW_STEPS]


def test_deepspeed_with_a_hostfile_by_ssh(cluster, demo_config, runs, hostfile, one_machine) -> None:
    if reason := ssh.missing():
        pytest.skip(f"no ssh between test machines: {reason} (Debian: apt-get install {ssh.PACKAGES})")
    ssh.start(cluster)
    words = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile, "--master_port", "21001"]
    everywhere(cluster, {"n1": [*words, *program(demo_config, runs, "ssh")]})
    close(losses(runs / "ssh"), one_machine, 1e-4)


def test_deepspeed_without_ssh(cluster, demo_config, runs, hostfile, one_machine) -> None:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    commands = {}
    for number, name in enumerate(("n1", "n2")):
        words = [deepspeed, "--hostfile", hostfile, "--no_ssh", "--node_rank", str(number)]
        where = ["--master_addr", "n1", "--master_port", "21002"]
        commands[name] = [*words, *where, *program(demo_config, runs, "no_ssh")]
    everywhere(cluster, commands)
    close(losses(runs / "no_ssh"), one_machine, 1e-4)


def test_torchrun(cluster, demo_config, runs, one_machine) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:21003", "--rdzv-id", "7"]
    everywhere(cluster, {name: [*words, *where, *program(demo_config, runs, "torchrun")] for name in ("n1", "n2")})
    close(losses(runs / "torchrun"), one_machine, 1e-4)
