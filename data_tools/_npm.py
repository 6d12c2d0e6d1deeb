"""Fetch packages of the npm registry into a cache, without installing them or running their scripts."""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools import _client, _progress
from pretrain.data.format import ShardError


class Package(NamedTuple):
    """One pinned package."""

    name: str
    version: str

    @property
    def file(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(packages: Sequence[Package], cache: Path) -> dict[Package, Path]:
    """Return the tarball of every package; those that lie whole in the cache are not fetched again.

    Raises:
        ShardError: npm is missing, or it could not fetch a package.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = {package: cache / package.file for package in packages}
    missing = [package for package, path in paths.items() if not is_whole(path)]
    if missing and not shutil.which("npm"):
        raise ShardError(
            "npm was not found, and the pictures are npm packages: install Node.js (Debian: apt-get install npm), "
            f"or put these {len(missing)} files into {cache} (each made by `npm pack NAME@VERSION` elsewhere): "
            + ", ".join(package.file for package in missing)
        )
    if missing:
        with _progress.bar(len(missing), doing="fetch", unit="package") as bar:
            for package in missing:
                _pack(package, cache)
                bar.update()
    return paths


def is_whole(path: Path) -> bool:
    """Return whether a tarball can be read to its last byte (its gzip checksum included)."""
    try:
        with gzip.open(path) as file:  # tarfile stops at the last member and never asks for the checksum
            while file.read(1 << 20):
                pass
        with tarfile.open(path, "r:gz") as tar:
            return tar.next() is not None
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return False


def _pack(package: Package, cache: Path) -> None:
    spec = f"{package.name}@{package.version}"
    command = [shutil.which("npm") or "npm", "pack", spec, "--ignore-scripts", "--loglevel=error"]
    _client.fetch(
        command, cache, package.file, is_whole=is_whole, client="npm", spec=spec, check="npm config get registry"
    )
