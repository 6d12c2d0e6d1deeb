"""A foreign file server on 127.0.0.1: plain GET only, no HEAD, no ranges, and bodies that break off as a test says."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves the files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.cut: dict[str, int] = {}  #: name -> bytes after which the connection is dropped
        self.cut_times: dict[str, int] = {}  #: name -> how often; left out: always
        self.stall: set[str] = set()  #: names that send no more after their cut, and keep the connection
        self.ended = threading.Event()
        self.no_length: set[str] = set()  #: names whose length is not told: the end of the connection is the end
        self.status: dict[str, int] = {}  #: name -> what is answered instead of a body
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        path = self.server.folder / name
        status = self.server.status.get(name) or (200 if path.is_file() else 404)
        self.send_response(status)
        if status != 200:
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = path.read_bytes()
        if name not in self.server.no_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.asked[name] <= self.server.cut_times.get(name, 1 << 60):
            body = body[: self.server.cut.get(name, len(body))]
        self.wfile.write(body)
        if name in self.server.stall:
            self.wfile.flush()
            self.server.ended.wait()

    def do_HEAD(self) -> None:
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Quiet."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the block ends."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
