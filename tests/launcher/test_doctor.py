"""doctor finds by name what is wrong with two nodes that are real to the network and to the disk."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import machine, meeting, node, world
from launcher.__main__ import main
from tests.launcher import nodes
from tests.launcher.nodes import HEAD, OTHER, Nodes

LACK = nodes.unavailable()
two_nodes = pytest.mark.skipif(bool(LACK), reason=LACK or "available")
PORT = 23456


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as made:
        yield made


def doctor(pair: Nodes, *words: str, folder: str = "") -> list[str]:
    given = [
        "--hostfile",
        pair.hostfile(),
        "--ssh",
        pair.shell(),
        "--port",
        str(PORT),
        "--need-gib",
        "0",
        "--seconds",
        "6",
    ]
    return [*given, "--folder", folder or str(pair.folder / "runs"), *words]


def said(capsys: pytest.CaptureFixture, words: list[str]) -> tuple[int, str]:
    code = main(["doctor", *words])
    return code, capsys.readouterr().out


def wrong(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("WRONG")]


def fault(capsys: pytest.CaptureFixture, words: list[str]) -> tuple[str, str]:
    """Return the one fault that doctor finds, and all that it says."""
    code, text = said(capsys, words)
    assert code == 1
    (line,) = wrong(text)
    return line, text


@two_nodes
def test_two_good_nodes(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    code, text = said(capsys, doctor(pair, "--no-all-reduce"))
    assert code == 0, text
    assert not wrong(text) and "network: ports open" in text
    assert not list((pair.folder / "runs").iterdir()), "doctor leaves nothing"


@two_nodes
def test_an_unlike_version(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    other = pair.folder / "site" / "torch-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    # one path, but another environment behind it on the other node
    pair.before[OTHER] = f"export python_path={other.parent}"
    words = doctor(pair, "--no-all-reduce", "--python", str(pair.folder / "python"))
    script = pair.folder / "python"
    script.write_text(
        f'#!/bin/sh\n[ -z "$python_path" ] || export PYTHONPATH=$python_path:$PYTHONPATH\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    line, _ = fault(capsys, words)
    assert "version: torch is" in line and f"9.9 on {OTHER}" in line


@two_nodes
def test_a_closed_port(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    rule = ("rule", "add", "ipproto", "tcp", "dport", str(PORT), "prohibit", "priority", "1")
    try:
        pair.run(OTHER, "ip", *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel cannot close a port by a rule: {error.stderr.strip()}")
    line, text = fault(capsys, doctor(pair))
    assert f"port: {OTHER} cannot reach {HEAD} at port {PORT}" in line
    assert "all-reduce: not tried" in text


@two_nodes
def test_a_port_closed_in_the_other_direction(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    rule = ("rule", "add", "ipproto", "tcp", "dport", "30000-60999", "prohibit", "priority", "1")
    try:
        pair.run(HEAD, "ip", *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel cannot close ports by a rule: {error.stderr.strip()}")
    # answers to the guest's own connection go to such ports too: only new connections are to be refused
    pair.run(HEAD, "ip", "rule", "add", "ipproto", "tcp", "sport", str(PORT), "table", "main", "priority", "0")
    line, _ = fault(capsys, doctor(pair, "--no-all-reduce"))
    assert f"port: {OTHER}: {HEAD} cannot connect back to it" in line


@two_nodes
def test_a_folder_that_is_not_shared(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    folder = pair.folder / "runs"
    folder.mkdir()
    pair.before[OTHER] = f"mount -t tmpfs none {folder}"
    line, _ = fault(capsys, doctor(pair, "--no-all-reduce"))
    assert f"folder: {OTHER} does not see in {folder} what {HEAD} has written there" in line


@two_nodes
def test_a_wrong_interface(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    pair.before[OTHER] = "export GLOO_SOCKET_IFNAME=eth1"
    line, _ = fault(capsys, doctor(pair, "--no-all-reduce"))
    assert f"interface: {OTHER}: GLOO_SOCKET_IFNAME=eth1, but no such interface" in line
    assert f"eth0 ({OTHER}); set GLOO_SOCKET_IFNAME=eth0" in line


@two_nodes
def test_a_full_disk(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    folder = pair.folder / "runs"
    folder.mkdir()
    fill = f"mount -t tmpfs -o size=64k none {folder} && head -c 1000000 /dev/zero > {folder}/full 2>/dev/null; true"
    pair.before[OTHER] = fill
    code, text = said(capsys, doctor(pair, "--no-all-reduce"))
    assert code == 1
    assert f"disk: {OTHER}: 1 MiB cannot be written to {folder} (ENOSPC No space left on device)" in wrong(text)[0]


@two_nodes
def test_a_node_that_does_not_answer(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    pair.before[OTHER] = "echo broken login >&2; exit 7"
    line, _ = fault(capsys, doctor(pair))
    assert f"node: {OTHER} does not answer: broken login" in line


@two_nodes
@pytest.mark.slow
def test_an_all_reduce_over_the_network(pair: Nodes, capsys: pytest.CaptureFixture) -> None:
    code, text = said(capsys, doctor(pair, "--ranks-per-node", "2"))
    assert code == 0, text
    assert "all-reduce: 4 ranks, 16 MiB in" in text


def test_little_room_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, text = said(capsys, ["--folder", str(tmp_path), "--need-gib", "1e9", "--no-all-reduce"])
    assert code == 1
    assert "disk: localhost:" in wrong(text)[0] and "1e+09 wanted" in wrong(text)[0]


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        code, text = said(
            capsys, ["--folder", str(tmp_path), "--port", str(taken), "--no-all-reduce", "--need-gib", "0"]
        )
    assert code == 1
    assert f"port: localhost: cannot listen on port {taken}" in wrong(text)[0]


def test_the_all_reduce_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--folder", str(tmp_path), "--ranks-per-node", "2", "--need-gib", "0", "--mib", "1"]
    code, text = said(capsys, words)
    assert code == 0, text
    assert "all-reduce: 2 ranks, 1 MiB in" in text


def test_a_python_without_torch_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, text = said(capsys, ["--folder", str(tmp_path), "--python", str(bare), "--need-gib", "0"])
    assert code == 1
    assert any("version: torch is not installed on localhost" in line for line in wrong(text))
    assert any("reduce: the all-reduce failed" in line for line in wrong(text))


def test_clocks_are_compared_and_the_word_is_taken_away(tmp_path: Path) -> None:
    port = world.free_port()
    parts = [meeting.Meeting(at, 3, "127.0.0.1", port, str(tmp_path), "t", 10) for at in range(3)]
    found: list[dict] = [{}, {}, {}]
    threads = [threading.Thread(target=lambda at=at: found.__setitem__(at, parts[at].meet())) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found[0] == {"listen": "", "folder": ""}
    for guest in found[1:]:
        assert (guest["connect"], guest["back"], guest["shared"]) == ("", "", "")
        assert abs(guest["offset"]) <= guest["round_trip"] + 1e-3
    assert not list(tmp_path.iterdir())


def test_a_node_tells_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert node.main(["facts", "--folder", str(tmp_path)]) == 0
    tree = json.loads(capsys.readouterr().out.partition(node.MARK)[2])
    assert tree["interfaces"] == machine.interfaces()
    assert tree["versions"]["torch"] != "missing" and tree["write"] == ""
