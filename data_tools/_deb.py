"""Fetch a Debian package into a cache and read its files in memory; nothing is installed, no name becomes a path."""

import io
import lzma
import os
import posixpath
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from pretrain.data.format import ShardError

PATIENCE_S = 900
_MAGIC, _HEADER = b"!<arch>\n", 60  # of an ar archive, which a .deb is


def fetch(name: str, cache: Path) -> Path:
    """Return the .deb of a package: the newest in the cache, else what `apt-get download` brings.

    Raises:
        ShardError: apt-get is missing, or it could not fetch the package.
    """
    cache.mkdir(parents=True, exist_ok=True)
    here = sorted(cache.glob(f"{name}_*.deb"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if here:
        return here[-1]
    apt = shutil.which("apt-get")
    if apt is None:
        raise ShardError(
            f"apt-get was not found, and the pictures are Debian's package {name}: put {name}_VERSION_all.deb "
            f"(from any Debian mirror or machine: `apt-get download {name}`) into {cache}"
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        try:
            done = subprocess.run(  # noqa: S603 (a fixed command, no shell)
                [apt, "download", name], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S,
                stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        except subprocess.TimeoutExpired:
            said = [f"no answer within {PATIENCE_S} s"]
        made = sorted(Path(folder).glob(f"{name}_*.deb"))
        if not made:
            raise ShardError(
                f"apt-get could not fetch {name} ({' '.join(said[:2]) or 'no message'}): run `apt-get update` once as "
                f"root, then the same command again; or put {name}_VERSION_all.deb into {cache}"
            )
        os.replace(made[-1], cache / made[-1].name)
        return cache / made[-1].name


def read(path: Path) -> dict[str, bytes]:
    """Return {name: bytes} of the files of a package, links inside it followed; names begin without slash.

    Raises:
        ShardError: not a package, cut off, or packed in a way that Python 3.11 cannot read.
    """
    again = f"delete it and run again: {path}"
    members = _ar(path.read_bytes())
    packed = next((name for name in members if name.startswith("data.tar")), None)
    if packed is None:
        raise ShardError(f"not a whole Debian package; {again}")
    if packed not in ("data.tar", "data.tar.gz", "data.tar.xz"):
        raise ShardError(f"{path}: its files are in {packed}, which this version cannot unpack; use a package with .xz")
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(members[packed])) as tar:
            for info in tar:
                name = posixpath.normpath(info.name).lstrip("/")
                if info.isfile():
                    files[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
                elif info.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ShardError(f"Debian package is damaged ({error}); {again}") from error
    for name, target in links.items():
        for _ in range(8):  # a link to a link
            target = links.get(target, target)
        if target in files:
            files[name] = files[target]
    return files


def _ar(data: bytes) -> dict[str, bytes]:
    """Return the members of an ar archive, as far as they are whole."""
    members: dict[str, bytes] = {}
    at = len(_MAGIC)
    while data.startswith(_MAGIC) and at + _HEADER <= len(data):
        name, size = data[at : at + 16].decode("latin-1").strip().rstrip("/"), data[at + 48 : at + 58].strip()
        if not size.isdigit() or at + _HEADER + int(size) > len(data):
            break
        members[name] = data[at + _HEADER : at + _HEADER + int(size)]
        at += _HEADER + int(size) + int(size) % 2
    return members
