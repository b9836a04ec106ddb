#!/usr/bin/env python
"""Decide for the batch script of launch/submit.py whether a run may start, and whether to requeue it when it has ended.

A run that stopped or crashed is requeued, until --max-restarts restarts in a row have brought no new checkpoint. The
count is kept in logs/restarts_<job>.json in the run's folder. Messages go to stderr. stdout is for the answer: the exit
code with which the script ends, or 0 to begin. The script does not go by the exit code of this program, which may be
that of a Python that cannot start. Light: without torch.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_pipeline.faults import LASTING, StorageError, retried
from launch.ranks import VERDICT_FILE, verdicts
from train import exit_codes
from train.checkpoint.info import list_checkpoints, step_of
from train.exit_codes import FINAL
from train.telemetry.formatting import clock

CONTROLLER_TIMEOUT = 600  # seconds that slurmctld may be unreachable
# Codes that name a cause. When one rank fails, the other ranks end with other codes.
CAUSES = (
    exit_codes.BAD_DATA,
    exit_codes.UNAVAILABLE,
    exit_codes.FAILED,
    exit_codes.IO_ERROR,
    exit_codes.BAD_CONFIG,
)


@dataclass(frozen=True)
class Starts:
    """Progress over a job's starts.

    checkpoints: those that the last start found, as from find_checkpoints. since: the last restart that found a new
    one, which may have a smaller step than an old one that is damaged.
    """

    checkpoints: dict[str, int]
    since: int

    def next(self, checkpoints: dict[str, int], restart: int) -> "Starts":
        """The state after `restart`, which finds `checkpoints`."""
        return Starts(checkpoints, restart if checkpoints.items() - self.checkpoints.items() else self.since)

    @property
    def newest(self) -> str:
        """The checkpoint that was written last, for messages."""
        if not self.checkpoints:
            return "the beginning"
        return f"step {step_of(Path(max(self.checkpoints, key=self.checkpoints.get)))}"


@dataclass(frozen=True)
class JobState:
    """A job's state, from squeue."""

    restarts: int
    state: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The exit code of a run. nodes: how many of the job's `of` nodes have reported it."""

    code: int
    nodes: int
    of: int

    def __str__(self) -> str:
        alone = self.code in FINAL and self.nodes < self.of
        return f"exit code {self.code}" + (f", on {self.nodes} of {self.of} nodes alone" if alone else "")


def conclude(reports: dict[int, set[int]], of: int, code: int) -> Verdict:
    """The verdict from the ranks' reports (exit code -> nodes) on `of` nodes, and from srun's exit code.

    A final code counts only if a rank has reported it: srun returns 0 if it could not start the ranks, and a rank that
    srun ended has a higher code.
    """
    if 0 in reports:
        return Verdict(0, of, of)
    for reported in sorted(reports, key=lambda reported: -len(reports[reported])):
        if reported in CAUSES:
            return Verdict(reported, len(reports[reported]), of)
    return Verdict(1 if code in FINAL else code, of, of)


def final(verdict: Verdict, restarts: int) -> bool:
    """Whether another start would end the same way.

    Two cases are not final. At a restart, BAD_CONFIG means that the folder is still in use by ranks on a node that
    SLURM has lost, because the first start accepted the configuration. And a code that only some nodes report is a
    fault of a node.
    """
    return (
        verdict.code in FINAL
        and verdict.nodes >= verdict.of
        and not (verdict.code == exit_codes.BAD_CONFIG and restarts > 0)
    )


def decide(verdict: Verdict, after: Starts | None, max_restarts: int, restarts: int, job: JobState) -> tuple[bool, str]:
    """Whether to requeue after `verdict` on start `restarts`, and why.

    after: the state after another start; None if it cannot be read, and that start has to count.
    """
    if final(verdict, restarts):
        return False, FINAL[verdict.code]
    if job.restarts != restarts:
        return False, "SLURM has requeued this job already"
    # A job that was cancelled, preempted without grace or requeued by a user is COMPLETING: SLURM has decided what
    # happens next, and a requeue would restart a cancelled job. A job at its time limit is COMPLETING too, but would
    # end.
    if not (job.state == "RUNNING" or (job.state == "COMPLETING" and job.reason == "TimeLimit")):
        return False, f"SLURM has decided already (the job is {job.state}): it was cancelled, or will be started again"
    if after and restarts + 1 - after.since > max_restarts:
        return False, f"no newer checkpoint than {after.newest} after {max_restarts} restarts; see the ranks' logs"
    return True, "put back into the queue"


def find_checkpoints(run: Path) -> dict[str, int]:
    """Name and time (ns) of each committed checkpoint: one whose step was taken again has another time."""
    return {path.name: path.stat().st_mtime_ns for path in list_checkpoints(run / "checkpoints")}


def begin(run: Path, max_restarts: int) -> int:
    """Count this start. Return the job's exit code if there have been too many, else 0."""
    with contextlib.suppress(StorageError, *LASTING):
        retried(_forget_verdicts, os.environ[VERDICT_FILE])
    restart = _restarts()
    try:
        before, starts = _count(run, restart)
    except (StorageError, *LASTING) as error:
        before = starts = Starts({}, 0)
        say(f"{run}'s restarts cannot be counted ({_reason(error)}): all count as ones without a newer checkpoint")
    if starts != before:
        try:
            retried(lambda: _write_starts(run, starts), str(_file(run)))
        except (StorageError, *LASTING) as error:
            starts = replace(starts, since=before.since if before else 0)
            rest = f"restarts after number {starts.since} count as ones without a newer checkpoint"
            say(f"{_file(run)} cannot be written ({_reason(error)}): {rest}")
    say(f"start {restart} of job {_job()} on {os.environ['SLURM_JOB_NODELIST']}, from {starts.newest}")
    if restart - starts.since > max_restarts:
        why = f"no newer checkpoint than {starts.newest} after {max_restarts} restarts"
        say(f"not started: {why}; see the ranks' logs")
        return 1
    return 0


def end(run: Path, max_restarts: int, code: int) -> int:
    """Requeue the job if `decide` recommends it. code: srun's exit code. Return the job's exit code."""
    ended = conclude(verdicts(os.environ[VERDICT_FILE]), int(os.environ["SLURM_JOB_NUM_NODES"]), code)
    if final(ended, _restarts()):
        say(f"{ended}: {FINAL[ended.code]}")
        return ended.code
    after, newest = None, "checkpoints cannot be read"
    try:
        _, after = _count(run, _restarts() + 1)
        newest = after.newest
    except (StorageError, *LASTING) as error:
        say(f"{run}'s restarts cannot be counted ({_reason(error)}): the next start counts them")
    deadline = time.monotonic() + CONTROLLER_TIMEOUT
    while True:
        error = None
        try:
            requeue, reason = decide(ended, after, max_restarts, _restarts(), _ask())
            if requeue:
                subprocess.run(["scontrol", "requeue", _job()], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as failed:
            error = " ".join(failed.stderr.split())
        except (OSError, ValueError) as failed:
            error = str(failed)
        if error is None:
            say(f"{ended}, {newest}: {reason}")
            return ended.code
        if time.monotonic() > deadline:
            say(f"{ended}, {newest}: cannot be put back into the queue ({error}); submit it again")
            return ended.code
        say(f"slurmctld does not answer, trying again ({error})")
        time.sleep(5)


def say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the job's log may be on a full disk
        print(clock(time.time()), sentence, file=sys.stderr, flush=True)


def _ask() -> JobState:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={_job()}", "--Format=RestartCnt:|,State:|,Reason:|"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")
    }  # a user's own filters
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    fields = answer.stdout.strip().split("|")
    if len(fields) < 3:
        raise ValueError(f"squeue answered {answer.stdout!r}")
    return JobState(int(fields[0]), fields[1], fields[2])


def _job() -> str:
    """This job's id for squeue and scontrol. In an array, the plain number would mean the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _file(run: Path) -> Path:
    return run / "logs" / f"restarts_{os.environ['SLURM_JOB_ID']}.json"


def _count(run: Path, restart: int) -> tuple[Starts | None, Starts]:
    """The state that was written last, if any, and the one after `restart`. Raises StorageError or LASTING errors."""
    before = retried(lambda: _read_starts(run), str(_file(run)))
    checkpoints = retried(lambda: find_checkpoints(run), str(run / "checkpoints"))
    return before, before.next(checkpoints, restart) if before else Starts(checkpoints, restart)


def _reason(error: Exception) -> str:
    return (error.__cause__ or error).strerror


def _read_starts(run: Path) -> Starts | None:
    """The state that was written last; None if there is none, or its file is not whole or of an older program."""
    try:
        return Starts(**json.loads(_file(run).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _forget_verdicts() -> None:
    """Remove the reports of the start before."""
    path = Path(os.environ[VERDICT_FILE])
    for report in path.parent.glob(f"{path.name}.*"):
        report.unlink(missing_ok=True)


def _write_starts(run: Path, starts: Starts) -> None:
    temporary = _file(run).with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(asdict(starts)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, _file(run))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--code", type=int, help="end: srun's exit code")
    arguments = parser.parse_args()
    # SLURM sends SIGTERM to all processes of a job that is preempted or out of time; the decision must still be made.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.moment == "begin":
        answer = begin(arguments.run, arguments.max_restarts)
    else:
        answer = end(arguments.run, arguments.max_restarts, arguments.code)
    print(answer)
    return answer  # for scripts that were submitted before 2026-11-28


if __name__ == "__main__":
    sys.exit(main())
