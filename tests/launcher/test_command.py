"""Jobs that do not fit together are refused; the others become the command that their launcher understands."""

from pathlib import Path

import pytest

from launcher import command, job
from launcher.job import Job, JobError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "mpirun"}, "--with mpirun: choose one of"),
        ({"program": "train"}, "choose pretrain or finetune"),
        ({"config": ""}, "no config"),
        ({"overrides": ("train.steps",)}, "section.key=value"),
        ({"overrides": ("--nodes=2",)}, "section.key=value"),
        ({"ranks_per_node": 0}, "--ranks-per-node 0"),
        ({"ranks_per_node": 2}, "one rank, not 2"),
        ({"kind": "deepspeed", "nodes": 2}, "--hostfile"),
        ({"kind": "torchrun", "nodes": 2}, "--node-rank"),
        ({"kind": "torchrun", "nodes": 2, "node_rank": 2}, "it is 0 to 1"),
        ({"kind": "torchrun", "nodes": 2, "node_rank": 1}, "--master-addr"),
        ({"master_port": 70000}, "--master-port 70000"),
    ],
)
def test_refused(given: dict, said: str) -> None:
    with pytest.raises(JobError, match=said):
        Job(**{"config": "c.yaml", **given})


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"config c\.yaml: no such file"):
        Job("c.yaml", folder=str(tmp_path)).check_files()
    with pytest.raises(JobError, match="no such folder"):
        Job("c.yaml", folder=str(tmp_path / "gone")).check_files()


def test_a_job_survives_json() -> None:
    given = Job("c.yaml", ("a.b=1",), kind="srun", nodes=2, ranks_per_node=8)
    assert job.from_tree(given.tree()) == given
    with pytest.raises(JobError, match="unknown colour"):
        job.from_tree({**given.tree(), "colour": 1})


def build(**given: object) -> str:
    return " ".join(command.build(Job("c.yaml", ("a.b=1",), python="PY", **given), port=7, env={}))


def test_the_program_comes_last_with_its_words() -> None:
    for given in ({}, {"kind": "deepspeed"}, {"kind": "torchrun"}, {"kind": "srun"}):
        assert build(**given).endswith(f"{job.ROOT}/pretrain/main.py --config c.yaml a.b=1")
    assert Path(Job("c.yaml", program="finetune").script).is_file()


def test_one_machine() -> None:
    assert build().startswith("PY " + job.ROOT)
    assert "--master_port 7 --num_gpus 4" in build(kind="deepspeed", ranks_per_node=4)
    assert "--nproc-per-node 4" in build(kind="torchrun", ranks_per_node=4)


def test_several_nodes() -> None:
    several = {"nodes": 2, "ranks_per_node": 4, "master_addr": "a", "master_port": 7}
    assert "--hostfile h --master_addr a" in build(kind="deepspeed", hostfile="h", **several)
    assert "--no_ssh --node_rank 1" in build(kind="deepspeed", hostfile="h", node_rank=1, **several)
    assert "--nnodes 2 --node-rank 1 --master-addr a" in build(kind="torchrun", node_rank=1, **several)
    words = command.build(Job("c", kind="srun", nodes=2, ranks_per_node=4), port=7, env={"SLURM_CPUS_PER_TASK": "6"})
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=6", "--kill-on-bad-exit=0"} <= set(words)
