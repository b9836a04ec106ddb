"""The jobs of `make gpu`: some at a time compile side by side, and those that are timed then take turns, alone.

A job that is timed first compiles all that it needs, and then waits for its turn (`Session.turn`). The scheduler then
pauses the other jobs and lets those that wait measure, one after the other. So nothing is compiled twice, and no
process starts while something is measured.
"""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.record import ROOT, Part, Record, Session, cores, locked

TURN = 90  # seconds that a job may take for what is timed
TAIL = 2500  # characters of a failed job's output that are printed
BARRIER = re.compile(r".*UserWarning: barrier.*")  # torch warns so if a process group does not know its device


def record(session: Session, part: Part) -> Record:
    return Record(session.output / f"gpu-{part.name}.json", part.judge, f"launch/gpu.py --parts {part.name}")


@dataclass
class Job:
    """A job of a part, in a process and a process group of its own."""

    part: Part
    name: str
    process: subprocess.Popen = field(init=False)
    log: Path = field(init=False)
    until: float = field(init=False)  # it is ended at this time; pauses do not count
    paused: float | None = None  # since when
    cut_off: bool = False

    def start(self, session: Session, environment: dict[str, str]) -> None:
        self.log = session.work / f"{self.part.name}-{self.name}.log".replace(" ", "_")
        command = [sys.executable, "launch/gpu.py", "--job", self.part.name, self.name, "--work", str(session.work)]
        if session.rehearsal and self.part.name in ("host", "check", "kernels"):
            environment = {**environment, "TRITON_INTERPRET": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, *options(session)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.until = time.monotonic() + (1e6 if session.rehearsal else self.part.limit)

    def waits(self, session: Session) -> bool:
        """Whether it has compiled what it needs, and waits for its turn."""
        return self.part.alone and session.waiting(self.process.pid).exists()

    def take_turn(self, session: Session) -> None:
        self.until = time.monotonic() + (1e6 if session.rehearsal else TURN)
        with contextlib.suppress(BrokenPipeError):  # it has failed already
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def pause(self) -> None:
        self.paused = time.monotonic()
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self.until += time.monotonic() - self.paused
        self.paused = None
        self._send(signal.SIGCONT)

    def ended(self, end: float) -> bool:
        """Whether its process has ended; it is ended here when its time, or that of all jobs, is over."""
        if self.process.poll() is None:
            if time.monotonic() < min(self.until, end):
                return False
            self.cut_off = True
        self._send(signal.SIGKILL)  # what it has started, too
        return True

    def report(self, session: Session) -> None:
        """After its end: note in the part's record that it has finished, or what went wrong."""
        code = self.process.wait()
        text = self.log.read_text(errors="replace")  # with what the runs that the job has started say
        warned = BARRIER.search(text)
        why = "not done in time" if self.cut_off else f"ended with {code}" if code else warned[0] if warned else ""
        print(f"  {self.part.name} / {self.name}{f': {why}' if why else ''}", flush=True)
        if why or '"failed"' in text:
            (session.output / f"gpu-{self.log.name}").write_text(text[-200_000:])
            print(text[-TAIL:], flush=True)
        record(session, self.part).finish(self.name, why)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def in_order(parts: Sequence[Part]) -> list[Job]:
    """The first job of each part, then the second of each, and so on: every part has something early."""
    most = max((len(part.jobs) for part in parts), default=0)
    return [Job(part, list(part.jobs)[number]) for number in range(most) for part in parts if number < len(part.jobs)]


def run_jobs(
    session: Session,
    environment: dict[str, str],
    parts: Sequence[Part],
    end: float,
    places: int = 1,
    preparing: Callable[[], bool] = lambda: False,
) -> None:
    """Run all jobs of the parts until the time `end`, at most `places` of them side by side.

    preparing: whether something else still uses the machine, so that nothing may be timed.
    """
    for part in parts:
        record(session, part).begin(list(part.jobs))
    # Each job compiles in threads of its own; not all of them do so all the time.
    environment = environment | {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(cores(), 2 * cores() // places)))}
    waiting, active = in_order(parts), []
    try:
        while (waiting and time.monotonic() < end) or active:
            while waiting and len(active) < places:
                active.append(waiting.pop(0))
                active[-1].start(session, environment)
            ready = [job for job in active if job.waits(session)]
            for job in ready:
                job.until = math.inf  # waiting does not count
            if not preparing() and ready:
                take_turns(session, ready, [job for job in active if job not in ready], end)
            for job in [job for job in active if job.ended(end)]:
                active.remove(job)
                job.report(session)
            time.sleep(0.02)
    finally:
        for job in active:  # this process was interrupted
            job.ended(0)


def take_turns(session: Session, ready: Sequence[Job], others: Sequence[Job], end: float) -> None:
    """Let each of `ready` measure what it has compiled, one after the other, while `others` are paused."""
    with locked(session.output):  # no job may be paused while it changes a record: it would keep the others waiting
        for job in others:
            job.pause()
    for job in ready:
        job.take_turn(session)
        while not job.ended(end):
            time.sleep(0.02)
    for job in others:
        job.resume()


def options(session: Session) -> list[str]:
    """The session as arguments of another process."""
    given = ["--output", str(session.output), "--cache", str(session.cache)]
    for name in ("images", "cifar"):
        given += [f"--{name}", str(path)] if (path := getattr(session, name)) else []
    return [*given, *(["--rehearse"] if session.rehearsal else [])]
