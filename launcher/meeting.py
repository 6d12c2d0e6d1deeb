"""Nodes meet over the network and over the disk: who reaches whom, whose clock is off, who does not see the folder.

Node 0 writes a word into the folder and listens. Each other node connects, asks for the time, is connected back to, and
looks for the word. Ports are open or closed in each direction by themselves, so both are tried.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

PINGS = 5
BACK = 5.0  #: seconds for the connection back


@dataclass(frozen=True)
class Meeting:
    """One node's part."""

    index: int
    count: int
    head: str  #: name or address of node 0
    port: int
    folder: str  #: that all are said to share
    token: str  #: of this meeting
    seconds: float = 20.0

    @property
    def word(self) -> str:
        """Return the path of the file by which nodes see that they share the folder."""
        return os.path.join(self.folder, f".doctor-{self.token}")

    def meet(self) -> dict[str, Any]:
        """Return what this node has found."""
        return self._host() if self.index == 0 else self._visit()

    # -- node 0 --------------------------------------------------------------------------------------------------------

    def _host(self) -> dict[str, Any]:
        out: dict[str, Any] = {"listen": "", "folder": self._write_word()}
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", self.port))
                listener.listen(self.count)
                self._serve(listener)
        except OSError as error:
            out["listen"] = f"{error.strerror or error}"
        finally:
            with suppress(OSError):
                os.unlink(self.word)
        return out

    def _write_word(self) -> str:
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(self.word, "w", encoding="utf-8") as file:
                file.write(self.token)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return f"{error.strerror or error}"
        return ""

    def _serve(self, listener: socket.socket) -> None:
        until = time.monotonic() + self.seconds
        guests: list[threading.Thread] = []
        while len(guests) < self.count - 1 and time.monotonic() < until:
            listener.settimeout(max(0.1, until - time.monotonic()))
            with suppress(socket.timeout):
                connection, address = listener.accept()
                guests.append(threading.Thread(target=self._answer, args=(connection, address[0]), daemon=True))
                guests[-1].start()
        for guest in guests:
            guest.join(max(0.1, until + BACK - time.monotonic()))

    def _answer(self, connection: socket.socket, address: str) -> None:
        """Tell one guest the time, then connect back to it."""
        with suppress(OSError, ValueError, KeyError), connection:
            connection.settimeout(self.seconds)
            lines = connection.makefile("rw", encoding="utf-8", newline="\n")
            while True:
                asked = json.loads(lines.readline())
                if "back" not in asked:
                    _tell(lines, {"time": time.time()})
                    continue
                try:
                    socket.create_connection((address, int(asked["back"])), timeout=BACK).close()
                    _tell(lines, {"back": ""})
                except OSError as error:
                    _tell(lines, {"back": f"{error.strerror or error}"})
                lines.readline()  # it has looked for the word; the file can go
                return

    # -- the others ----------------------------------------------------------------------------------------------------

    def _visit(self) -> dict[str, Any]:
        out: dict[str, Any] = {"connect": "", "back": "", "offset": 0.0, "round_trip": 0.0, "head_address": ""}
        try:
            out["head_address"] = socket.gethostbyname(self.head)
        except OSError as error:
            out["connect"] = f"{self.head} cannot be resolved: {error.strerror or error}"
            return {**out, "shared": self._look()}
        connection, problem = self._connect(out["head_address"])
        if connection is None:
            return {**out, "connect": problem, "shared": self._look()}
        try:
            with connection, socket.socket() as listener:
                listener.bind(("", 0))
                listener.listen(1)
                lines = connection.makefile("rw", encoding="utf-8", newline="\n")
                out["offset"], out["round_trip"] = _compare_clocks(lines)
                _tell(lines, {"back": listener.getsockname()[1]})
                out["back"] = json.loads(lines.readline())["back"]
                out["shared"] = self._look()
                _tell(lines, {})
        except (OSError, ValueError, KeyError) as error:
            out["connect"] = f"the connection broke: {error}"
        return {"shared": "", **out}

    def _connect(self, address: str) -> tuple[socket.socket | None, str]:
        """Connect to node 0, which may start later."""
        until, problem = time.monotonic() + self.seconds / 2, ""
        while time.monotonic() < until:
            try:
                connection = socket.create_connection((address, self.port), timeout=max(0.5, until - time.monotonic()))
                connection.settimeout(self.seconds)
                return connection, ""
            except OSError as error:
                problem = f"{error.strerror or error}"
                time.sleep(0.2)
        return None, problem

    def _look(self) -> str:
        """Return why node 0's word is not seen here, "" where it is."""
        until, problem = time.monotonic() + self.seconds / 4, ""  # a network disk may show it late
        while True:
            try:
                with open(self.word, encoding="utf-8") as file:
                    return "" if file.read() == self.token else "another content"
            except OSError as error:
                problem = f"{error.strerror or error}"
            if time.monotonic() > until:
                return problem
            time.sleep(0.2)


def _tell(lines: IO[str], tree: dict[str, Any]) -> None:
    lines.write(json.dumps(tree) + "\n")
    lines.flush()


def _compare_clocks(lines: IO[str]) -> tuple[float, float]:
    """Return how far this clock is ahead of node 0's, and the round trip that bounds the error, in seconds."""
    found = []
    for _ in range(PINGS):
        sent = time.time()
        _tell(lines, {})
        there = float(json.loads(lines.readline())["time"])
        got = time.time()
        found.append((got - sent, (sent + got) / 2 - there))
    round_trip, offset = min(found)
    return offset, round_trip
