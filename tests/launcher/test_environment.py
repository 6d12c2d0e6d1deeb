"""Defaults of the environment: with a reason, and never instead of what is set."""

from launcher import environment, machine


def names(**given: object) -> dict[str, str]:
    facts = {"gpus": 0, "cores": 8, "ranks_per_node": 2, "nodes": 1, **given}
    return {d.name: d.value for d in environment.defaults(**facts)}


def test_cores_are_shared_out_where_there_is_no_gpu() -> None:
    assert names()["OMP_NUM_THREADS"] == "4"
    assert names(ranks_per_node=16)["OMP_NUM_THREADS"] == "1"
    assert names(gpus=2)["OMP_NUM_THREADS"] == "1"
    assert "DS_ACCELERATOR" in names() and "DS_ACCELERATOR" not in names(gpus=1)
    assert "NCCL_DEBUG" in names(gpus=1) and "NCCL_DEBUG" not in names()


def test_an_interface_is_named_only_where_the_name_leads_nowhere() -> None:
    assert not {"GLOO_SOCKET_IFNAME"} & set(names(nodes=2, here="10.0.0.4"))
    found = names(nodes=2, here="127.0.1.1", master="127.0.0.1")
    others = [card for card, address in machine.interfaces().items() if not address.startswith("127.")]
    assert found.get("GLOO_SOCKET_IFNAME") == (others[0] if others else None)
    assert "NCCL_SOCKET_IFNAME" not in found


def test_which_interface() -> None:
    cards = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    assert machine.needed_interface("10.0.0.1", cards, "ib0") == ""
    assert machine.needed_interface("127.0.1.1", cards, "ib0") == "ib0", "over which the others are reached"
    assert machine.needed_interface("", cards, "lo") == machine.needed_interface("127.0.1.1", cards) == "eth0"
    assert machine.needed_interface("", {"lo": "127.0.0.1"}) == ""


def test_what_is_set_stays_and_every_line_says_why() -> None:
    wanted = environment.defaults(gpus=1, cores=8, ranks_per_node=1, nodes=1)
    env, lines = environment.complete({"NCCL_DEBUG": "INFO", "HOME": "x"}, wanted)
    assert env["NCCL_DEBUG"] == "INFO" and env["HOME"] == "x"
    assert "NCCL_DEBUG=INFO  (as it was set)" in lines
    assert len(lines) == len(wanted) and all("(" in line for line in lines)


def test_caches_of_two_pythons_are_two() -> None:
    one, two = (names(python=python)["TORCH_EXTENSIONS_DIR"] for python in ("/a/python", "/b/python"))
    assert one != two


def test_gpus_that_are_hidden_do_not_count(tmp_path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    assert machine.gpus({}, str(tmp_path)) == 2
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": "1"}, str(tmp_path)) == 1
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": ""}, str(tmp_path)) == 0


def test_the_loopback_interface_is_found() -> None:
    assert "127.0.0.1" in machine.interfaces().values()
    assert machine.interface_to("127.0.0.1") in machine.interfaces()
