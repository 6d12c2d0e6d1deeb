"""Every other scheme that fsspec knows: s3, gs, az, hf, sftp and so on. Keys and endpoints come from its own settings.

That is: the store's usual environment (AWS_*, GOOGLE_*), FSSPEC_S3_ANON=true and the like, or ~/.config/fsspec/*.json.
"""

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec.registry import known_implementations

from pretrain.config import ConfigError
from pretrain.data.transports import base

PIECE = 8 * base.CHUNK  # one request; a broken connection costs no more than this
S3 = ("s3", "s3a")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  #: scheme -> extra of ours that installs it

T = TypeVar("T")


def schemes() -> list[str]:
    """Return the schemes that fsspec knows, installed or not."""
    return sorted(fsspec.available_protocols())


def check(scheme: str) -> None:
    """Refuse a scheme whose library is not installed.

    Raises:
        ConfigError: says what to install.
    """
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        told = known_implementations.get(scheme, {}).get("err", str(error))
        how = f"pip install 'diptych[{extra}]'" if extra else told
        raise ConfigError(f"data.shards: {scheme}:// needs a library that is not installed: {how}") from None


class Transport(base.Transport):
    """Any fsspec file system, one request at a time, without its own retries and caches."""

    def open(self, url: str, start: int) -> base.Stream:
        """Return the object from `start` on."""
        files, path = _where(url)
        info = _ask(lambda: files.info(path))
        if info.get("type") != "file":
            raise base.Refused("it is a folder")
        length = info.get("size")
        if length is None:
            return base.Stream(0, None, "", _whole(files, path), lambda: None)
        return base.Stream(start, int(length), _md5(info), _pieces(files, path, start, int(length)), lambda: None)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Return exactly the bytes [start, stop)."""
        files, path = _where(url)
        return _piece(files, path, start, stop)


def _where(url: str) -> tuple[Any, str]:
    """Return the file system of this process and the path in it (fsspec keeps one for each set of options and pid)."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in S3:
        network = {"connect_timeout": base.CONNECT_SECONDS, "read_timeout": base.STALL_SECONDS}
        options["config_kwargs"] = {**network, "retries": {"total_max_attempts": 1, "mode": "standard"}}
        options.update(fsspec.config.conf.get("s3", {}))
    files, path = _ask(lambda: fsspec.core.url_to_fs(url, **options))
    if scheme in S3:
        files.retries = 1  # ours have a deadline and are told
    return files, path


def _ask(question: Callable[[], T]) -> T:
    """Return an answer; what fsspec and the libraries under it raise becomes Refused or Broken."""
    try:
        return question()
    except FileNotFoundError:
        raise base.Missing("the store has no such object") from None
    except PermissionError as error:
        raise base.Missing(f"the store refuses access ({error})") from None
    except (IsADirectoryError, NotImplementedError) as error:
        raise base.Refused(str(error) or "it is a folder") from None
    except (AssertionError, AttributeError, ImportError, NameError, TypeError):
        raise  # a mistake in a program is no weather
    except Exception as error:  # each library has its own: botocore, aiohttp, google, paramiko
        name = type(error).__name__
        if "Credential" in name or "Auth" in name:
            raise base.Refused(f"no valid credentials ({error})") from None
        said = (
            error.strerror if isinstance(error, OSError) and error.strerror else f"{name}: {error}".removesuffix(": ")
        )
        raise base.Broken(said) from None


def _piece(files: Any, path: str, start: int, stop: int) -> bytes:
    data: bytes = _ask(lambda: files.cat_file(path, start=start, end=stop))
    if len(data) != stop - start:
        raise base.Broken(f"asked for bytes {start} to {stop}, got {len(data)}")
    return data


def _pieces(files: Any, path: str, start: int, length: int) -> Iterator[bytes]:
    for begin in range(start, length, PIECE):
        yield _piece(files, path, begin, min(begin + PIECE, length))


def _whole(files: Any, path: str) -> Iterator[bytes]:
    with _ask(lambda: files.open(path, "rb")) as file:
        while data := _ask(lambda: file.read(base.CHUNK)):
            yield data


def _md5(info: dict[str, Any]) -> str:
    """Return the content's MD5 where the store gives it; the ETag of an object in several parts is none."""
    if isinstance(stored := info.get("md5Hash"), str):
        return base64.b64decode(stored).hex()
    etag = str(info.get("ETag", "")).strip('"').lower()
    return etag if re.fullmatch(r"[0-9a-f]{32}", etag) else ""
