"""A rank is told from its launcher, also where that has a RANK of its own: it would be killed in the rank's place."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end import killer


@pytest.mark.parametrize("script", [killer.PRETRAIN, killer.FINETUNE])
def test_a_launcher_with_a_rank_is_no_rank(tmp_path: Path, script: str) -> None:
    """A process that has trained leaves RANK to all that it starts."""
    (tmp_path / script).parent.mkdir()
    (tmp_path / script).write_text("input()")
    (tmp_path / "launch.py").write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-u', *sys.argv[3:]])")
    run = f"killer-{os.getpid()}"
    command = [sys.executable, "launch.py", "--num_gpus", "1", script, f"run.name={run}"]
    env = {**os.environ, "RANK": "0"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdin=subprocess.PIPE) as launcher:
        try:
            deadline = time.monotonic() + 60
            while not (found := killer.of_rank(run, 0)):
                assert time.monotonic() < deadline, "no rank was found"
                time.sleep(0.05)
            assert launcher.pid not in found and len(found) == 1
            assert killer.of_rank(run, 1) == []
        finally:
            launcher.communicate(b"\n", timeout=60)
