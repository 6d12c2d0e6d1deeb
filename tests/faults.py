"""A web server on loopback that serves a folder, or stands before another server, and misbehaves on demand."""

import hashlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

STATUS = {"403": "Forbidden", "404": "Not Found", "429": "Too Many Requests", "503": "Service Unavailable"}
FAULTS = (*STATUS, "drop", "stall", "truncate", "garble")
STALL_SECONDS = 5  # longer than a test's own patience


class Server:
    """What is asked is noted in `asked`; `spoil` sets what goes wrong next."""

    def __init__(self, folder: Path | None = None, *, upstream: str = "", ranges: bool = True) -> None:
        self.folder, self.upstream, self.ranges = folder, upstream, ranges
        self.asked: list[str] = []
        self.pause = 0.0  # seconds before each answer
        self._faults: list[list] = []
        self._change = threading.Lock()
        self._end = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def spoil(self, fault: str, *, path: str = ".tar", times: int = 1) -> None:
        """Let the next `times` GETs whose path holds `path` go wrong."""
        assert fault in FAULTS
        with self._change:
            self._faults.append([fault, path, times])

    def heal(self) -> None:
        with self._change:
            self._faults.clear()

    def gets(self, part: str) -> list[str]:
        return [line for line in self.asked if line.startswith("GET") and part in line]

    def fault(self, method: str, path: str) -> str:
        with self._change:
            for entry in self._faults:
                if method == "GET" and entry[1] in path and entry[2] > 0:
                    entry[2] -= 1
                    return entry[0]
        return ""

    def close(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(folder: Path | None = None, **options) -> Iterator[Server]:
    server = Server(folder, **options)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        asked = self.owner
        asked.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        asked._end.wait(asked.pause)
        fault = asked.fault(self.command, self.path)
        if fault in STATUS:
            self._send(int(fault), {"Retry-After": "0"} if fault == "429" else {}, b"no")
            return
        status, headers, body = self._upstream() if asked.upstream else self._file()
        if fault == "garble":
            body = body[:-600] + bytes([body[-600] ^ 1]) + body[-599:]
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        if fault == "truncate":  # a proxy that cuts and says so nowhere
            body = body[: len(body) // 2]
            headers["Content-Length"] = str(len(body))
        self._send(status, headers, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = _answer

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status, STATUS.get(str(status)))
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("drop", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.owner._end.wait(STALL_SECONDS)
            self.close_connection = True
            return
        self.wfile.write(body)

    def _file(self) -> tuple[int, dict[str, str], bytes]:
        assert self.owner.folder is not None
        path = self.owner.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return 404, {}, b"nothing here"
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        asked = self.headers.get("Range", "")
        if not asked or not self.owner.ranges:
            return 200, headers, data
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last or len(data) - 1) + 1
        part = data[start:stop]
        return 206, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}, part

    def _upstream(self) -> tuple[int, dict[str, str], bytes]:
        host = urlsplit(self.owner.upstream)
        connection = http.client.HTTPConnection(host.hostname, host.port, timeout=30)
        sent = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        length = int(self.headers.get("Content-Length", 0))
        connection.request(self.command, self.path, self.rfile.read(length) if length else None, sent)
        answer = connection.getresponse()
        body = answer.read()
        drop = {"connection", "transfer-encoding", "date", "server"}
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        connection.close()
        return answer.status, headers, body

    def log_message(self, *_: object) -> None:
        pass
