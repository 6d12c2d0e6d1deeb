"""Fetch packages of the npm registry into a cache, without installing them or running their scripts."""

import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools import _progress
from pretrain.data.format import ShardError

PATIENCE_S = 900  # for one package; the largest has 16 MB


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
    """Fetch one package next to the cache and give it its name there only when it is whole."""
    spec = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        try:
            done = subprocess.run(  # noqa: S603 (a fixed command, no shell)
                [shutil.which("npm") or "npm", "pack", spec, "--ignore-scripts", "--loglevel=error"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                stdin=subprocess.DEVNULL,
            )
            said = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            said = [f"no answer within {PATIENCE_S} s"]
        made = Path(folder) / package.file
        if not is_whole(made):
            raise ShardError(
                f"npm could not fetch {spec} ({' '.join(said[:2]) or 'no message'}): check the network and "
                f"`npm config get registry`, then run the same command again, or put {package.file} into {cache}"
            )
        os.replace(made, cache / package.file)
