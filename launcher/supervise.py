"""Run a command to its end: pass signals on, judge the exit code, start again or go back to the queue.

A run that fails is started again, by the same command, from its last checkpoint, after a pause that grows; one that
fails without coming further is a crash loop and is stopped. A launcher whose run was taken over by another start ends
its ranks and writes nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable

from launcher import again, ranks, run_folder, slurm, verdict
from launcher.verdict import EXIT_INTERRUPTED, EXIT_REQUEUE, Policy

POLL = 0.2  #: seconds between looks at the signals
LOOK = 2.0  #: seconds between looks at the run folder, which may be on a network disk
REMOTE_SAVE = 60.0  #: seconds that ranks on other machines may save after their launcher has left
LAUNCH = "DIPTYCH_LAUNCH"  #: the variable by which a run notes whose it is


@dataclass
class Supervisor:
    """Runs one job to its end."""

    start: Callable[[int], list[str]]  #: attempt (from 0) -> the command
    env: dict[str, str]  #: of the run, with LAUNCH
    run: str  #: the run's folder; it need not exist yet
    policy: Policy = field(default_factory=Policy)
    kind: str = "python"  #: what starts the ranks (launcher/job.py)
    slurm_job: str = ""  #: of this process; "": not in a job, nothing is queued again
    nodes: int = 1
    by_hand: bool = True  #: a person started it; failures of earlier starts are forgiven
    records: bool = True  #: this is the node that writes the record
    on_claim: Callable[[], None] = lambda: None  #: called once when the run has taken its folder over
    say: Callable[[str], None] = lambda line: print(f"launcher: {line}", file=sys.stderr, flush=True)
    _signals: list[int] = field(default_factory=list)
    _asked: int = 0
    _interrupts: int = 0
    _ours: bool = False
    _stale: bool = False
    _before: str | None = None  #: whose the folder was when this start began
    _ends: list[dict[str, Any]] = field(default_factory=list)

    def supervise(self) -> int:
        """Run to the end; return the exit code: the run's own, or EXIT_REQUEUE where the same command goes on."""
        if not self.by_hand:
            self._ends = verdict.failures(run_folder.launches(self.run))
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, lambda n, frame: self._signals.append(n)) for number in watched}
        try:
            return self._attempts()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempts(self) -> int:
        attempt = 0
        while True:
            began = time.time()
            code, seconds = self._once(self.start(attempt))
            if self._stale:
                self.say(f"{self.run}: another start of this run has taken over; this one has ended and wrote nothing")
                return 1
            judged, progress = self._judge(code, began)
            self._note_end(judged, code, progress, seconds)
            final = self._answer(judged, code)
            if final is not None:
                return final
            if self._pause(self.policy.wait(verdict.without_progress(self._ends))):
                self.say("asked to stop between two starts; the same command goes on from the last checkpoint")
                return EXIT_INTERRUPTED if self._asked == signal.SIGINT else self._back_to_queue()
            attempt += 1

    # -- one start -----------------------------------------------------------------------------------------------------

    def _once(self, words: list[str]) -> tuple[int, float]:
        """Run the command once; return its code (128 + n for signal n, as a shell says it) and seconds."""
        began = time.monotonic()
        self._before = run_folder.owner(self.run)
        try:
            # A session of its own: Ctrl-C must reach the ranks once, from here, and not kill their launcher. Not so
            # srun: SLURM loses sight of what leaves its session, where it tracks processes by group.
            child = subprocess.Popen(words, env=self.env, start_new_session=self.kind != "srun")
        except OSError as error:
            self.say(f"{words[0]} cannot be started: {error}")
            return 127, 0.0
        looked = 0.0
        try:
            while True:
                self._pass_on(child)
                if time.monotonic() - looked > LOOK:
                    self._look(child)
                    looked = time.monotonic()
                try:
                    code = child.wait(timeout=POLL)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            self._end(child)  # ranks whose launcher was killed would go on alone
        self._look(None)
        return code if code >= 0 else 128 - code, time.monotonic() - began

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        if self.kind != "srun":
            ranks.end_group(child.pid)
        elif child.poll() is None:
            child.terminate()  # srun ends its tasks on all nodes

    def _pass_on(self, child: subprocess.Popen[bytes]) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._asked = number
            self._interrupts += number == signal.SIGINT
            name = signal.Signals(number).name
            if self._interrupts > 2:
                self.say("third Ctrl-C: killing everything")
                self._end(child)
            elif self.kind == "srun":
                # srun answers TERM by killing its tasks at once, and nothing would be saved
                child.send_signal(signal.SIGUSR1 if number != signal.SIGINT else number)
                self.say(f"{name}: passed on to srun")
            else:
                self.say(f"{name}: passed on to {len(ranks.send(child.pid, number))} processes")

    def _look(self, child: subprocess.Popen[bytes] | None) -> None:
        """See whether the run has taken its folder over, or another start has taken it from this one."""
        owner = run_folder.owner(self.run)
        if owner == self.env[LAUNCH] and not self._ours:
            self._ours = True
            if self.records:
                self._write(lambda: run_folder.record(self.run, event="start", by_hand=self.by_hand, **self._where()))
                self._write(self.on_claim)
        # also where this start took the folder over and lost it between two looks
        elif owner not in (None, self.env[LAUNCH]) and (self._ours or self._before not in (None, owner)):
            self._stale = True
            if child is not None:
                self._end(child)

    def _write(self, write: Callable[[], object]) -> None:
        """Write to the run folder; a disk that is full or away is no reason to end ranks that run."""
        try:
            write()
        except OSError as error:
            self.say(f"{self.run}: the launcher's record was not written: {error}")

    def _where(self) -> dict[str, Any]:
        names = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}
        return {key: os.environ[name] for key, name in names.items() if name in os.environ}

    # -- after it ------------------------------------------------------------------------------------------------------

    def _judge(self, code: int, began: float) -> tuple[str, run_folder.Progress]:
        """Return the verdict and how far the run has come."""
        until = time.monotonic() + (REMOTE_SAVE if self._asked and self.kind == "deepspeed" and self.nodes > 1 else 0)
        while True:
            saved = run_folder.stopped_by_signal(self.run, began)
            if saved or time.monotonic() >= until:
                break
            time.sleep(1)
        progress = run_folder.progress(self.run)
        trusted = progress if self.kind == "deepspeed" and self._ours else None
        return verdict.judge(code, asked=self._asked, saved_on_signal=saved, progress=trusted), progress

    def _note_end(self, judged: str, code: int, progress: run_folder.Progress, seconds: float) -> None:
        line = {"event": "end", "verdict": judged, "code": code, "step": progress.step, "saved": progress.saved}
        self._ends = [*self._ends, line] if judged in verdict.FAILURES else []
        if self.records and self._ours:
            self._write(lambda: run_folder.record(self.run, **line, seconds=round(seconds, 1), **self._where()))
        note = f"step {progress.step}" + (f" of {progress.steps}" if progress.steps else "")
        note += f", last checkpoint at step {progress.saved}" if progress.saved >= 0 else ", no checkpoint yet"
        self.say(f"{judged} (exit code {code}) after {seconds:.0f} s: {note}")

    def _answer(self, judged: str, code: int) -> int | None:
        """Return the exit code, or None: start again."""
        if judged == verdict.DONE:
            return 0
        if judged in (verdict.MISTAKE, verdict.INTERRUPTED):
            return EXIT_INTERRUPTED if judged == verdict.INTERRUPTED else code
        if judged == verdict.STOPPED:
            return self._back_to_queue()
        why = verdict.loop(self._ends, self.policy)
        if why:
            self.say(f"not started again: {why}. Read the log above, mend it, and start the same command")
            return code or 1
        if self.slurm_job:
            if judged == verdict.AGAIN:
                return self._back_to_queue()
            silent = slurm.silent_nodes(self.nodes)
            if silent:
                self.say(f"a node of this job does not answer ({silent}); the run goes on elsewhere")
                return self._back_to_queue()
        return None

    def _back_to_queue(self) -> int:
        """Queue this job again unless somebody has cancelled it; without SLURM whoever sent the signal knows."""
        if not self.slurm_job:
            self.say("stopped; the same command goes on from the last checkpoint")
            return EXIT_REQUEUE
        refused = again.requeue(self.slurm_job, self.say)
        self.say(f"not queued again: {refused}" if refused else "back to the queue")
        return EXIT_REQUEUE

    def _pause(self, seconds: float) -> bool:
        """Wait before the next start; return whether a signal came."""
        self.say(f"starting again in {seconds:.0f} s")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._signals:
            time.sleep(min(POLL, max(0.0, until - time.monotonic())))
        if self._signals:
            self._asked = self._signals.pop()
            return True
        return False
