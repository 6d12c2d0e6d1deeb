"""Which rank a process is, under each launcher's variables."""

import pytest
import torch
import torch.distributed as torch_dist

from pretrain.config import ConfigError
from pretrain.engine.process import first_host, place


def test_without_a_launcher_it_is_alone():
    assert place({}) == (0, 1, 0, 1, "none")


def test_deepspeed_and_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert place({**env, "LOCAL_SIZE": "4"}) == (5, 8, 1, 4, "env")
    assert place({**env, "LOCAL_WORLD_SIZE": "4"}) == (5, 8, 1, 4, "env")


def test_srun_but_not_the_batch_script_around_it():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert place(batch).world == 1
    step = {**batch, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    assert place({**step, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) == (5, 8, 1, 4, "srun")


@pytest.mark.parametrize("env", [{"RANK": "two", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_contradictions_are_refused(env):
    with pytest.raises(ConfigError, match="launcher variables"):
        place(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("node[003-007,9],other", "node003"),
        ("node[12,14]", "node12"),
        ("a1,node[1-2]", "a1"),
        ("gpu[1-2].cluster,x", "gpu1.cluster"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def leave_a_collective_behind() -> None:
    """Start an all-reduce whose tensor nobody else holds: only the group's thread can free it, under the GIL."""
    torch_dist.all_reduce(torch.ones(1_000_000), async_op=True)


def test_leaving_the_group_waits_for_its_threads_without_the_gil(ranks):
    for _ in range(3):
        ranks.run(2, leave_a_collective_behind, timeout=60)  # the pool leaves by process.shutdown
