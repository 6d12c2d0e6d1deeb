"""Hostfiles and SLURM's short forms."""

import pytest

from launcher import hostfile
from launcher.job import JobError


def test_a_hostfile_is_read_and_written() -> None:
    text = "# the cluster\nnode1 slots=8\n\nnode2   slots = 4  # half of it\nnode3\n"
    hosts = hostfile.parse(text)
    assert hosts == [("node1", 8), ("node2", 4), ("node3", 1)]
    assert hostfile.parse(hostfile.write(hosts)) == hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no machine"),
        ("a slots=two", "line 1: 'a slots=two'; write it as"),
        ("a slots=0", "a has no slot"),
        ("a slots=1\na slots=2", "line 2: a is there twice"),
    ],
)
def test_mistakes_in_a_hostfile(text: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        hostfile.parse(text)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("one", ["one"]),
        ("a[1-3,7]", ["a1", "a2", "a3", "a7"]),
        ("node[098-101],login", ["node098", "node099", "node100", "node101", "login"]),
        ("gpu[1-2].cluster,x", ["gpu1.cluster", "gpu2.cluster", "x"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ],
)
def test_node_lists(nodes: str, hosts: list[str]) -> None:
    assert hostfile.expand(nodes) == hosts


@pytest.mark.parametrize("nodes", ["a[1-", "a[x]", "a[]"])
def test_broken_node_lists(nodes: str) -> None:
    with pytest.raises(JobError, match="node list"):
        hostfile.expand(nodes)


def test_counts() -> None:
    assert hostfile.counts("2(x3),1") == [2, 2, 2, 1]
    assert hostfile.counts("4") == [4]
    with pytest.raises(JobError):
        hostfile.counts("many")
