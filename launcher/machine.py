"""What this machine has: cores, GPUs, network interfaces, room on a disk. Asked of the kernel, without any library."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
from typing import Mapping

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def cores() -> int:
    """Return the cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def gpus(env: Mapping[str, str] = os.environ, dev: str = "/dev") -> int:
    """Return the NVIDIA GPUs that a process started here would see."""
    try:
        there = sum(bool(re.match(r"^nvidia\d+$", name)) for name in os.listdir(dev))
    except OSError:
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    return len([word for word in visible.split(",") if word.strip() not in ("", "-1", "NoDevFiles")])


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each network interface that has one: {"lo": "127.0.0.1", "eth0": ...}."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return {}
    out = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:  # no address
                continue
            out[name] = socket.inet_ntoa(answer[20:24])
    return out


def interface_to(host: str) -> str:
    """Return the interface over which packets to a host leave, "" where there is none. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            here = probe.getsockname()[0]
    except OSError:
        return ""
    return next((name for name, address in interfaces().items() if address == here), "")


def needed_interface(address: str, cards: Mapping[str, str], toward: str = "") -> str:
    """Return the interface that gloo must be told of, "" where it need not.

    It listens where the machine's own name leads: on Debian often 127.0.1.1, which no other node can reach.

    Args:
        address: what the machine's name stands for.
        cards: the address of each interface.
        toward: the interface over which the other nodes are reached, where that is known.
    """
    if address and not address.startswith("127."):
        return ""
    if toward not in ("", "lo"):
        return toward
    return next((card for card, own in cards.items() if not own.startswith("127.")), "")


def own_address() -> str:
    """Return the address that this machine's own name stands for, "" where it stands for none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def free_space(path: str) -> tuple[int, int]:
    """Return free and all bytes of the disk that a path (or its nearest folder that exists) is on."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    usage = shutil.disk_usage(path)
    return usage.free, usage.total
