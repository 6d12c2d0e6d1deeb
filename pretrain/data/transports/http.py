"""http and https: one connection a thread, kept alive; proxies, certificates and .netrc as everywhere (requests)."""

import base64
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing

import requests
import urllib3

from pretrain.data.transports import base

SCHEMES = ("http", "https")
BUSY = {408, 425, 429}  # as any 5xx: try again
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _Sessions(threading.local):
    """A session for each thread of each process: a fork must not talk on its parent's connections."""

    def __init__(self) -> None:
        self.owner = 0

    def get(self) -> requests.Session:
        if self.owner != os.getpid():
            self.owner, self.session = os.getpid(), requests.Session()
        return self.session


_SESSIONS = _Sessions()


class Transport(base.Transport):
    """Plain GETs: a HEAD is refused where an address is signed for GET."""

    def open(self, url: str, start: int) -> base.Stream:
        """Return the body from `start` on; from 0 where the server answers with the whole."""
        response = _get(url, {"Range": f"bytes={start}-"} if start else {})
        part = _range(response)
        if part is not None:
            start, _, length = part
        else:
            start, length = 0, _length(response)
        return base.Stream(start, length, _md5(response), _chunks(response), response.close)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Return exactly the bytes [start, stop)."""
        with closing(_get(url, {"Range": f"bytes={start}-{stop - 1}"})) as response:
            part = _range(response)
            if part is None:
                raise base.Refused("the server serves no ranges; set data.range_reads to false to read whole shards")
            data = b"".join(_chunks(response))
        if part[0] != start or len(data) != stop - start:
            raise base.Broken(f"asked for bytes {start} to {stop}, got {len(data)} from byte {part[0]}")
        return data


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    try:
        response = _SESSIONS.get().get(
            url,
            headers={"Accept-Encoding": "identity", **headers},  # a tar in transit is the tar, byte for byte
            stream=True,
            timeout=(base.CONNECT_SECONDS, base.STALL_SECONDS),
        )
    except requests.exceptions.SSLError as error:
        kind = base.Refused if "CERTIFICATE_VERIFY_FAILED" in str(error) else base.Broken
        raise kind(f"no trusted connection ({_root(error)})") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects, ValueError) as error:
        raise base.Refused(f"the URL or its redirects cannot be followed ({type(error).__name__})") from None
    except requests.exceptions.ConnectTimeout:
        raise base.Broken(f"no connection within {base.CONNECT_SECONDS} s") from None
    except requests.exceptions.ReadTimeout:
        raise base.Broken(f"no answer within {base.STALL_SECONDS} s") from None
    except requests.exceptions.RequestException as error:
        raise base.Broken(f"no connection ({_root(error)})") from None
    try:
        _check(response)
    except (base.Refused, base.Broken):
        response.close()
        raise
    return response


def _check(response: requests.Response) -> None:
    status = f"{response.status_code} {response.reason}"
    if response.status_code in (401, 403, 404, 410):
        raise base.Missing(f"the server answers {status}")
    if response.status_code >= 500 or response.status_code in BUSY:
        wait = response.headers.get("Retry-After", "")
        raise base.Broken(f"the server answers {status}", wait=float(wait) if wait.isdigit() else 0)
    if response.status_code not in (200, 206):
        raise base.Refused(f"the server answers {status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise base.Refused(f"the server insists on sending it compressed ({encoding})")


def _range(response: requests.Response) -> tuple[int, int, int | None] | None:
    """Return (first byte, stop, length of the whole) of a partial answer, None for a whole one."""
    if response.status_code != 206:
        return None
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None:
        raise base.Broken("a partial answer that does not say which part it is")
    first, last, length = found.groups()
    return int(first), int(last) + 1, None if length == "*" else int(length)


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _md5(response: requests.Response) -> str:
    """Return what the server says of the content: Content-MD5, or what object stores say on their HTTP side."""
    headers = response.headers
    given = headers.get("Content-MD5", "") if response.status_code == 200 else ""  # of a part, it is the part's
    stored = re.search(r"md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
    if stored or given:
        try:
            return base64.b64decode(stored[1] if stored else given, validate=True).hex()
        except ValueError:
            return ""
    etag = headers.get("ETag", "").strip('"').lower()
    return etag if "x-amz-request-id" in headers and re.fullmatch(r"[0-9a-f]{32}", etag) else ""


def _chunks(response: requests.Response) -> Iterator[bytes]:
    got = 0
    try:
        while data := response.raw.read(base.CHUNK, decode_content=False):
            got += len(data)
            yield data
    except urllib3.exceptions.ReadTimeoutError:
        raise base.Broken(f"stalled for {base.STALL_SECONDS} s after {got} bytes") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise base.Broken(f"the connection broke after {got} bytes ({_root(error)})") from None


def _root(error: BaseException) -> str:
    """Return the innermost reason: outer ones repeat the address, which may be signed."""
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None:
            return str(error) or type(error).__name__
        error = inner
