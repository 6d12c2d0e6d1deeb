"""What is wrong with nodes is said by name, from what they tell; doctor's real nodes are in test_doctor.py."""

import copy
from typing import Any

import pytest

from launcher import findings
from launcher.findings import GIB, Finding

NODE: dict[str, Any] = {
    "address": "10.0.0.1",
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    "variables": {},
    "gpus_here": 2,
    "gpus": {"list": [["H100", "81559", "4", "550.1"], ["H100", "81559", "4", "550.1"]], "problem": ""},
    "versions": {"python": "3.11.7", "torch": "2.6.0", "deepspeed": "0.19.8", "diptych": "abc"},
    "free": 100 * GIB,
    "write": "",
    "temporary_free": 50 * GIB,
    "shared_memory": 64 * GIB,
}
MET: dict[str, Any] = {
    "connect": "", "back": "", "offset": 0.001, "round_trip": 0.001, "head_address": "10.0.0.1", "shared": ""
}  # fmt: skip


def facts(**changes: Any) -> list[Finding]:
    """Return the findings of two good nodes and a third, n3, that has these changes."""
    nodes = {name: copy.deepcopy(NODE) for name in ("n1", "n2", "n3")}
    for key, value in changes.items():
        nodes["n3"][key] = {**nodes["n3"][key], **value} if isinstance(value, dict) else value
    return findings.of_facts(nodes, ranks=2, need_gib=10, folder="runs")


def test_nothing_is_wrong_with_good_nodes() -> None:
    assert facts() == []


@pytest.mark.parametrize(
    ("changes", "kind", "fatal", "said"),
    [
        ({"versions": {"torch": "2.5.1"}}, "version", True, "torch is 2.6.0 on n1, n2; 2.5.1 on n3"),
        ({"versions": {"diptych": "abc+"}}, "version", True, "diptych is abc on n1, n2; abc+ on n3; bring"),
        ({"gpus": {"list": [], "problem": "no devices"}}, "gpu", True, "n3: nvidia-smi fails (no devices)"),
        ({"gpus_here": 1}, "gpu", True, "n3: 2 ranks but 1 GPUs are visible"),
        ({"gpus": {"list": [["H100", "81559", "70000", "550.1"]]}}, "gpu", False, "n3: memory is in use (GPU 0: 70000"),
        (
            {"gpus": {"list": [["A100", "81559", "4", "550.1"]]}},
            "gpu",
            False,
            "unlike GPUs: H100 on n1, n2; A100 on n3",
        ),
        (
            {"gpus": {"list": [["H100", "81559", "4", "535.2"]]}},
            "version",
            False,
            "driver is 550.1 on n1, n2; 535.2 on n3",
        ),
        ({"free": 2 * GIB}, "disk", True, "n3: 2.0 GiB free for runs, 10 wanted"),
        ({"write": "ENOSPC No space left"}, "disk", True, "n3: 1 MiB cannot be written to runs (ENOSPC"),
        ({"temporary_free": GIB // 2}, "disk", False, "n3: 0.50 GiB free in /tmp"),
        ({"shared_memory": 64 * 2**20}, "memory", False, "n3: /dev/shm has 64 MiB"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, "interface", True, "n3: GLOO_SOCKET_IFNAME=ib0, but no such"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "lo"}}, "interface", True, "leads to this machine only"),
        ({"address": "127.0.1.1"}, "interface", False, "n3: its own name stands for 127.0.1.1"),
    ],
)
def test_one_thing_is_wrong_with_n3(changes: dict, kind: str, fatal: bool, said: str) -> None:
    (found,) = facts(**changes)
    assert (found.kind, found.fatal) == (kind, fatal)
    assert said in found.text and said in found.line()


@pytest.mark.parametrize("value", ["eth", "=eth0", "^lo,docker", "ib0,eth0"])
def test_forms_of_nccls_variable(value: str) -> None:
    assert facts(variables={"NCCL_SOCKET_IFNAME": value}) == []


def test_no_torch_at_all() -> None:
    node = copy.deepcopy(NODE)
    node["versions"]["torch"] = "missing"
    (found,) = findings.of_facts({"n1": node}, ranks=1, need_gib=1, folder="runs")
    assert "torch is not installed on n1" in found.text


def met(**changes: Any) -> list[Finding]:
    nodes = {"n1": {"listen": "", "folder": ""}, "n2": dict(MET), "n3": {**MET, **changes}}
    return findings.of_meeting(nodes, port=23456, folder="runs")


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"connect": "timed out"}, "port", "n3 cannot reach n1 (10.0.0.1) at port 23456 (timed out)"),
        ({"back": "No route to host"}, "port", "n3: n1 cannot connect back to it (No route to host)"),
        ({"offset": -3.2}, "clock", "n3: its clock is 3.2 s behind that of n1"),
        ({"shared": "No such file"}, "folder", "n3 does not see in runs what n1 has written there"),
    ],
)
def test_a_meeting_that_goes_wrong(changes: dict, kind: str, said: str) -> None:
    (found,) = met(**changes)
    assert found.kind == kind and said in found.text


def test_a_good_meeting_and_a_slow_line() -> None:
    assert met() == []
    assert met(offset=2.0, round_trip=3.0) == []  # the error of the comparison is as large


def test_a_port_that_is_taken_is_the_only_finding() -> None:
    nodes = {"n1": {"listen": "Address already in use", "folder": ""}, "n2": {**MET, "connect": "refused"}}
    (found,) = findings.of_meeting(nodes, port=7, folder="runs")
    assert "n1: cannot listen on port 7 (Address already in use)" in found.text
