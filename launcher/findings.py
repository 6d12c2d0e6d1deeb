"""From what the nodes tell to what is wrong, by name, and what to do about it."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from launcher import machine

GIB = 2**30
SKEW = 1.0  #: seconds between two clocks that make logs of two nodes misleading
BUSY = 1024  #: MiB used of a GPU that nobody should be using


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str  #: version, gpu, disk, memory, interface, port, clock, folder, node, reduce
    fatal: bool  #: a run will fail; else it may
    text: str  #: which node, what, and what to do

    def line(self) -> str:
        """Return the line to print."""
        return f"{'WRONG' if self.fatal else 'doubt'}  {self.kind}: {self.text}"


def wrong(kind: str, text: str) -> Finding:
    """Return a finding with which a run will fail."""
    return Finding(kind=kind, fatal=True, text=text)


def doubt(kind: str, text: str) -> Finding:
    """Return a finding with which a run may fail, or be slow."""
    return Finding(kind=kind, fatal=False, text=text)


def of_facts(nodes: Mapping[str, dict[str, Any]], *, ranks: int, need_gib: float, folder: str) -> list[Finding]:
    """Return what is wrong with each node by itself and between them; `nodes` by name, `ranks` a node."""
    out = [*_versions(nodes), *_unlike(nodes)]
    for name, facts in nodes.items():
        out += [
            *_gpus(name, facts, ranks),
            *_disk(name, facts, need_gib, folder),
            *_interfaces(name, facts, len(nodes)),
        ]
    return out


def _groups(values: Mapping[str, Any]) -> str:
    """Return `2.6.0 on n1, n3; 2.5.1 on n2`, the most frequent first."""
    by_value: dict[Any, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    ordered = sorted(by_value.items(), key=lambda pair: -len(pair[1]))
    return "; ".join(f"{value or 'unknown'} on {', '.join(names)}" for value, names in ordered)


def _versions(nodes: Mapping[str, dict[str, Any]]) -> list[Finding]:
    out = []
    what = sorted({key for facts in nodes.values() for key in facts["versions"]})
    for key in what:
        values = {name: facts["versions"].get(key, "missing") for name, facts in nodes.items()}
        if len(set(values.values())) > 1:
            do = (
                "bring all nodes to one commit"
                if key == "diptych"
                else "install the same on all nodes (constraints.txt)"
            )
            out.append(wrong("version", f"{key} is {_groups(values)}; {do}"))
        elif key in ("torch", "deepspeed") and "missing" in values.values():
            out.append(wrong("version", f"{key} is not installed on {', '.join(values)}; see --python"))
    return out


def _unlike(nodes: Mapping[str, dict[str, Any]]) -> list[Finding]:
    telling = {name: facts["gpus"]["list"] for name, facts in nodes.items() if not facts["gpus"]["problem"]}
    kinds = {name: ", ".join(sorted({gpu[0] for gpu in gpus})) for name, gpus in telling.items()}
    drivers = {name: ", ".join(sorted({gpu[3] for gpu in gpus})) for name, gpus in telling.items()}
    out = []
    if len(set(kinds.values())) > 1:
        out.append(doubt("gpu", f"unlike GPUs: {_groups(kinds)}; the slowest sets the pace of all"))
    if len(set(drivers.values())) > 1:
        out.append(doubt("version", f"the GPU driver is {_groups(drivers)}; NCCL may refuse to work with both"))
    return out


def _gpus(name: str, facts: dict[str, Any], ranks: int) -> list[Finding]:
    found, there = facts["gpus"], facts["gpus_here"]
    if found["problem"]:
        text = f"{name}: nvidia-smi fails ({found['problem']}); its driver needs a restart, or leave the node out"
        return [wrong("gpu", text)]
    if there and ranks > there:
        text = f"{name}: {ranks} ranks but {there} GPUs are visible (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
        return [wrong("gpu", text)]
    busy = [
        f"GPU {at}: {gpu[2]} MiB" for at, gpu in enumerate(found["list"]) if gpu[2].isdigit() and int(gpu[2]) > BUSY
    ]
    if busy:
        text = f"{name}: memory is in use ({'; '.join(busy)}); end what an earlier run has left (nvidia-smi shows it)"
        return [doubt("gpu", text)]
    return []


def _disk(name: str, facts: dict[str, Any], need_gib: float, folder: str) -> list[Finding]:
    out = []
    free = facts["free"] / GIB
    if facts["write"]:
        text = f"{name}: 1 MiB cannot be written to {folder} ({facts['write']}); free space, or choose another run.dir"
        out.append(wrong("disk", text))
    elif free < need_gib:
        text = f"{name}: {free:.1f} GiB free for {folder}, {need_gib:g} wanted; free space, or lower --need-gib"
        out.append(wrong("disk", text))
    if facts["temporary_free"] < GIB:
        left = facts["temporary_free"] / GIB
        out.append(doubt("disk", f"{name}: {left:.2f} GiB free in /tmp, where compilers write; set TMPDIR"))
    if 0 < facts["shared_memory"] < GIB:
        size = facts["shared_memory"] / 2**20
        text = f"{name}: /dev/shm has {size:.0f} MiB, by which loader workers hand over batches; docker: --shm-size=8g"
        out.append(doubt("memory", text))
    return out


def _interfaces(name: str, facts: dict[str, Any], count: int) -> list[Finding]:
    cards = facts["interfaces"]
    shown = ", ".join(f"{card} ({address})" for card, address in cards.items()) or "none"
    outward = [card for card, address in cards.items() if not address.startswith("127.")]
    out = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = facts["variables"].get(variable, "")
        if not value:
            continue
        good = _chosen(variable, value, list(cards))
        better = f"set {variable}={outward[0]}" if outward else "give it an interface with an address"
        if not good:
            text = f"{name}: {variable}={value}, but no such interface has an address here; it has {shown}; {better}"
            out.append(wrong("interface", text))
        elif count > 1 and all(cards[card].startswith("127.") for card in good):
            text = f"{name}: {variable}={value} leads to this machine only; it has {shown}; {better}"
            out.append(wrong("interface", text))
    needed = machine.needed_interface(facts["address"], facts["interfaces"])
    if count > 1 and needed and not facts["variables"].get("GLOO_SOCKET_IFNAME"):
        text = (
            f"{name}: its own name stands for {facts['address'] or 'no address'}, where gloo would listen in vain; "
            f"set GLOO_SOCKET_IFNAME={needed} (`launcher run` does), or mend /etc/hosts"
        )
        out.append(doubt("interface", text))
    return out


def _chosen(variable: str, value: str, cards: list[str]) -> list[str]:
    """Return the interfaces that a variable allows: gloo wants names; NCCL also takes beginnings, =exact and ^not."""
    words = [word.strip() for word in value.lstrip("^=").split(",") if word.strip()]
    if variable.startswith("GLOO"):
        return [card for card in cards if card in words]
    exact = "=" in value[:2]
    hit = [card for card in cards if any(card == word if exact else card.startswith(word) for word in words)]
    return [card for card in cards if card not in hit] if value.startswith("^") else hit


def of_meeting(nodes: Mapping[str, dict[str, Any]], *, port: int, folder: str) -> list[Finding]:
    """Return what went wrong when the nodes met; the first of `nodes` is the one that listened."""
    names = list(nodes)
    head, out = names[0], []
    if nodes[head].get("listen"):
        text = f"{head}: cannot listen on port {port} ({nodes[head]['listen']}); end what uses it, or choose --port"
        return [wrong("port", text)]
    for name in names[1:]:
        found = nodes[name]
        where = f"{head}{_address(head, found)}"
        if found["connect"]:
            text = (
                f"{name} cannot reach {where} at port {port} ({found['connect']}); "
                "open TCP ports between the nodes (20000-60999), or choose the right interface"
            )
            out.append(wrong("port", text))
        elif found["back"]:
            text = f"{name}: {head} cannot connect back to it ({found['back']}); open TCP ports 32768-60999 on {name}"
            out.append(wrong("port", text))
        if abs(found["offset"]) > SKEW + found["round_trip"]:
            side = "ahead of" if found["offset"] > 0 else "behind"
            text = (
                f"{name}: its clock is {abs(found['offset']):.1f} s {side} that of {head}; start NTP (chrony) on both"
            )
            out.append(doubt("clock", text))
        if found["shared"]:
            if nodes[head].get("folder"):
                continue  # it could not be written at all: the disk's finding
            text = (
                f"{name} does not see in {folder} what {head} has written there ({found['shared']}); "
                "put run.dir on a disk that all nodes share"
            )
            out.append(wrong("folder", text))
    return out


def _address(head: str, found: dict[str, Any]) -> str:
    address = found.get("head_address")
    return f" ({address})" if address and address != head else ""
