"""pipe: what a shell command writes is the shard. Only where data.allow_pipe says so."""

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO

from pretrain.data.transports import base

SCHEMES = ("pipe",)
STALL_SECONDS = 120  # commands may take a while to log in somewhere


class Transport(base.Transport):
    """Each read starts the command anew."""

    ranges = False

    def open(self, url: str, start: int) -> base.Stream:
        """Return the command's output from its beginning."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the command)
        command = url.removeprefix("pipe:")
        running = subprocess.Popen(  # noqa: S602 (that is what pipe: means; refused unless the config allows it)
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )

        def close() -> None:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)  # the shell's children too
            running.wait()
            assert running.stdout is not None
            running.stdout.close()
            errors.close()

        return base.Stream(0, None, "", _chunks(running, errors), close)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Refuse: a command writes all or nothing."""
        raise base.Refused("a pipe has no ranges; set data.range_reads to false")


def _chunks(running: subprocess.Popen[bytes], errors: IO[bytes]) -> Iterator[bytes]:
    assert running.stdout is not None
    while True:
        if not select.select([running.stdout], [], [], STALL_SECONDS)[0]:
            raise base.Broken(f"the command wrote nothing for {STALL_SECONDS} s")
        data = os.read(running.stdout.fileno(), base.CHUNK)
        if not data:
            break
        yield data
    if code := running.wait():
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise base.Broken(f"the command ended with exit code {code} ({said or 'it says nothing'})", tries=5)
