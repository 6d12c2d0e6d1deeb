"""A run of a few lines that leaves what a real one leaves: what the supervisor sees of it, without torch's ten seconds.

python stand_in.py RUN STEPS WHAT...    one WHAT a start: what happens at that start, as STEP:HOW; the last one stays
HOW: a signal's name (to itself), an exit code, `stop` (save as after a signal, leave with 85), `hang`
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run, steps = Path(sys.argv[1]), int(sys.argv[2])
starts = run / "starts"
run.mkdir(parents=True, exist_ok=True)
start = len(starts.read_text().split()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(f"{os.environ.get('MASTER_PORT', '-')}\n")
step, _, how = (sys.argv[3:] or ["0:"])[min(start, max(0, len(sys.argv) - 4))].partition(":")
asked: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, frame: asked.append(n))


def save(done: int, *, owed: bool = False) -> None:
    folder = run / "checkpoints" / f"step-{done:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": done, "hooks_owed": owed}))
    (folder / "COMPLETE").write_text("{}")


done = max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)
if int(step) >= 0:  # -1: it fails before it has taken the folder over
    (run / "environment.json").write_text(json.dumps({"launch": os.environ.get("DIPTYCH_LAUNCH")}))
while done < steps:
    done += 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": done, "loss": 1 / done, "time": time.time(), "step_time": 0.01}) + "\n")
    with (run / "log.txt").open("a") as file:
        file.write(f"INFO step {done}/{steps}  loss 1.0\n")
    if done % 5 == 0:
        save(done)
    while how == "hang" and done == int(step) and not asked:
        time.sleep(0.01)
    if asked:
        save(done, owed=True)
        sys.exit(130 if signal.SIGINT in asked else 85)
    if how and done >= int(step):
        if how == "stop":
            save(done, owed=True)
            sys.exit(85)
        if how.isdigit():
            sys.exit(int(how))
        if how != "hang":
            signal.signal(getattr(signal, how), signal.SIG_DFL) if how != "SIGKILL" else None
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(5)
save(steps)
