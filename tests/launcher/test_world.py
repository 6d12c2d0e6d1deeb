"""The launcher and the ranks read the same place from the same variables."""

import pytest

from launcher import hostfile, world
from launcher.job import JobError
from pretrain.engine import process

BATCH = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
STEP = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
OPENMPI = {
    f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items()
}
ENVIRONMENTS = {"none": {}, "srun": STEP, "torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "openmpi": OPENMPI}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_as_the_ranks_see_it(kind: str) -> None:
    here, there = world.read(ENVIRONMENTS[kind]), process.place(ENVIRONMENTS[kind])
    assert here.kind == kind
    assert (here.rank, here.world, here.local_rank, here.local_world) == there[:4]


@pytest.mark.parametrize("restart", [0, 1, 40])
def test_the_port_as_the_ranks_see_it(restart: int) -> None:
    env = {**STEP, "SLURM_RESTART_COUNT": str(restart)}
    assert world.read(env).master_port == process.slurm_port(env)


def test_ports_of_starts_and_neighbours_differ_and_are_not_given_away_by_the_kernel() -> None:
    ports = [world.port(job, restart=restart) for job in range(500) for restart in range(2)]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= world.port(job, step=3, restart=9) < 32768 for job in range(0, 10**7, 9973))


def test_a_batch_script_is_no_rank_but_knows_its_nodes() -> None:
    found = world.read(BATCH)
    assert (found.kind, found.world, found.local_world) == ("slurm", 4, 2)
    assert found.hosts == ("node003", "node004")
    assert found.master_addr == "node003"
    assert process.place(BATCH).world == 1


def test_what_is_set_wins() -> None:
    found = world.read({**BATCH, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 7)


@pytest.mark.parametrize("nodes", ["one", "one,two", "node[003-007,9],other", "a1,node[1-2]", "gpu[1-2].cluster,x"])
def test_the_first_host_as_the_ranks_see_it(nodes: str) -> None:
    assert hostfile.expand(nodes)[0] == process.first_host(nodes)


@pytest.mark.parametrize(
    "env",
    [{"RANK": "two", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {**STEP, "SLURM_STEP_TASKS_PER_NODE": "x"}],
)
def test_contradictions_are_refused(env: dict) -> None:
    with pytest.raises(JobError):
        world.read(env)


def test_a_new_run_is_nobodys_rank() -> None:
    assert world.outside({**TORCHRUN, "HOME": "x"}) == {"TORCHELASTIC_RUN_ID": "none", "HOME": "x"}
    wish = {"MASTER_ADDR": "a", "HOME": "x"}
    assert world.outside(wish) == wish, "asked for, and no other run's"
