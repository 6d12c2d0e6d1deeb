"""How a checkpoint that lies in a hidden folder becomes one that exists: sums, one rename, and `latest`.

Files only, on one rank, in whatever thread. The token of the run folder is looked at before each step that another
start of the run would see.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pretrain.data.format import write_atomic
from pretrain.engine.pieces import complete, digest, step_of
from pretrain.engine.run_folder import RunFolder

VERSION = 1  # of the layout


class Publication:
    """Publishes the checkpoints of one run and removes those that are old."""

    def __init__(self, folder: RunFolder, *, keep_last: int, keep_every: int | None) -> None:
        self.folder = folder
        self.keep_last, self.keep_every = keep_last, keep_every

    def hidden(self, final: Path, what: str) -> Path:
        """Return a name of this start of the run's own, which no reader looks at, beside a checkpoint."""
        return final.with_name(f".{final.name}.{what}.{self.folder.token[:8]}.part")

    def publish(self, hidden: Path, final: Path, *, state: dict[str, Any], files: dict[str, Any]) -> None:
        """Add state.json and COMPLETE to a folder that holds all parts, and give it its name.

        `files` are size and sum of each part.

        Raises:
            OSError: no space, or another trouble of the disk.
            StaleRunError: a newer start of the run owns the folder.
        """
        write_atomic(hidden / "state.json", json.dumps(state).encode())
        facts = {"bytes": (hidden / "state.json").stat().st_size, "sha256": digest(hidden / "state.json")}
        tree = {"version": VERSION, "files": {**files, "state.json": facts}}
        write_atomic(hidden / "COMPLETE", json.dumps(tree, indent=1).encode())
        _fsync_folder(hidden)
        latest = self._prepared(final)
        old = self.hidden(final, "old")
        self.folder.check_token()
        if final.exists():  # saved again at the same step, e.g. after it was found damaged
            os.rename(final, old)
        os.rename(hidden, final)
        self._point(latest)
        shutil.rmtree(old, ignore_errors=True)
        for path in complete(final.parent)[self.keep_last :]:
            if not self.keep_every or step_of(path) % self.keep_every:
                shutil.rmtree(path, ignore_errors=True)

    def go_back(self, path: Path, *, remove: bool) -> None:
        """Let `latest` name an older checkpoint, so that later ones count no more; or remove them.

        Raises:
            OSError, StaleRunError: as `publish`.
        """
        latest = self._prepared(path)
        later = [p for p in complete(path.parent) if step_of(p) > step_of(path)]
        self._point(latest)
        for left in later if remove else []:
            shutil.rmtree(left, ignore_errors=True)

    def clear(self) -> None:
        """Remove what saves of this start of the run have left behind that failed or found the folder taken over."""
        for left in self.folder.checkpoints.glob(f".*.{self.folder.token[:8]}.part"):
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)

    def _prepared(self, path: Path) -> Path:
        """Return a file that names a checkpoint, to be put in the place of `latest`: that needs no space then."""
        latest = path.with_name(f".latest.{self.folder.token[:8]}.part")
        write_atomic(latest, path.name.encode() + b"\n")
        return latest

    def _point(self, latest: Path) -> None:
        self.folder.check_token()
        os.replace(latest, latest.with_name("latest"))
        _fsync_folder(latest.parent)


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
