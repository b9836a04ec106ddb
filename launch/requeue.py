#!/usr/bin/env python
"""What the batch script of launch/submit.py asks: may the run start, and does it come back when it has ended? Standard library only.

A run that stopped or crashed is put back into the queue, until `--max-restarts` restarts in a row have brought no newer checkpoint.
The count stands in `logs/restarts_<job>.json` in the run's folder.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.ranks import FINAL, VERDICT_FILE, verdicts
from train.telemetry.formatting import clock

CONTROLLER_PATIENCE = 600  # seconds that slurmctld may be away
CAUSES = (65, 69, 70, 74, 78)  # what a rank ends with for a reason of its own; the others follow from it, with other codes


@dataclass(frozen=True)
class Starts:
    """How a job's starts have gone: `step` of the newest checkpoint at the last start (-1: none), and `idle`, the restarts in a row,
    that one included, before which no newer checkpoint had come."""

    step: int
    idle: int

    def next(self, step: int) -> "Starts":
        """After one more start, that finds `step`."""
        return Starts(step, 0 if step > self.step else self.idle + 1)


@dataclass(frozen=True)
class JobState:
    """What slurmctld says of a job."""

    restarts: int
    state: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The exit code that a run has ended with; `nodes`: of how many nodes of the job's `of` a rank has said so."""

    code: int
    nodes: int
    of: int

    def __str__(self) -> str:
        alone = self.code in FINAL and self.nodes < self.of
        return f"exit code {self.code}" + (f", on {self.nodes} of {self.of} nodes alone" if alone else "")


def conclude(words: dict[int, set[int]], of: int, code: int) -> Verdict:
    """From the ranks' words (by exit code, the nodes that said it) on `of` nodes, and from srun's exit code.

    srun returns 0 where it could not start the ranks, and a rank that it ended has a higher code: of final codes only words count.
    """
    if 0 in words:
        return Verdict(0, of, of)
    for one in sorted(words, key=lambda one: -len(words[one])):
        if one in CAUSES:
            return Verdict(one, len(words[one]), of)
    return Verdict(1 if code in FINAL else code, of, of)


def final(verdict: Verdict, restarts: int) -> bool:
    """Whether another start would end the same way.

    A configuration that was good at the first start is not what is wrong at a later one: the folder is still in use by ranks that live
    on at a node which SLURM has lost. Nor is a dataset or a configuration bad that only one node finds so.
    """
    return verdict.code in FINAL and verdict.nodes >= verdict.of and not (verdict.code == 78 and restarts > 0)


def decide(verdict: Verdict, after: Starts, max_restarts: int, restarts: int, job: JobState) -> tuple[bool, str]:
    """Whether to requeue, and why: after `verdict` on start number `restarts`, where another start would be counted as `after`."""
    if final(verdict, restarts):
        return False, FINAL[verdict.code]
    if job.restarts != restarts:
        return False, "SLURM has requeued this job already"
    # Cancelled, preempted without grace or requeued by somebody, a job is COMPLETING: SLURM knows already what becomes of it, and a
    # requeue would bring a cancelled one back. At its time limit it is COMPLETING, too, and would end for good.
    if not (job.state == "RUNNING" or (job.state == "COMPLETING" and job.reason == "TimeLimit")):
        return False, f"SLURM has decided already (the job is {job.state}): it was cancelled, or will be started again"
    if after.idle > max_restarts:
        return False, f"no newer checkpoint than {_name(after.step)} after {max_restarts} restarts; see the ranks' logs"
    return True, "put back into the queue"


def newest_step(run: Path) -> int:
    """The step of the newest committed checkpoint, -1 where there is none."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name)), default=-1)


def begin(run: Path, max_restarts: int) -> int:
    """Count this start. The exit code of the job where there have been too many, else 0."""
    path = Path(os.environ[VERDICT_FILE])
    for word in path.parent.glob(f"{path.name}.*"):
        word.unlink(missing_ok=True)
    starts, step = _read_starts(run), newest_step(run)
    starts = starts.next(step) if starts else Starts(step, 0)
    try:
        _write_starts(run, starts)
    except OSError as error:
        say(f"{_file(run)} cannot be written ({error.strerror}): every restart counts as one without a newer checkpoint")
        starts = Starts(step, _restarts())
    say(f"start {_restarts()} of job {_job()} on {os.environ['SLURM_JOB_NODELIST']}, from {_name(starts.step)}")
    if starts.idle > max_restarts:
        say(f"not started: no newer checkpoint than {_name(starts.step)} after {max_restarts} restarts; see the ranks' logs")
        return 1
    return 0


def end(run: Path, max_restarts: int, code: int) -> int:
    """Requeue the job where that is right; `code` is srun's. The exit code of the job."""
    ended = conclude(verdicts(os.environ[VERDICT_FILE]), int(os.environ["SLURM_JOB_NUM_NODES"]), code)
    if final(ended, _restarts()):
        say(f"{ended}: {FINAL[ended.code]}")
        return ended.code
    after, deadline = (_read_starts(run) or Starts(-1, 0)).next(newest_step(run)), time.monotonic() + CONTROLLER_PATIENCE
    while True:
        error = None
        try:
            requeue, reason = decide(ended, after, max_restarts, _restarts(), _ask())
            if requeue:
                subprocess.run(["scontrol", "requeue", _job()], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as failed:
            error = " ".join(failed.stderr.split())
        if error is None:
            say(f"{ended}, {_name(after.step)}: {reason}")
            return ended.code
        if time.monotonic() > deadline:
            say(f"{ended}, {_name(after.step)}: cannot be put back into the queue ({error}); submit it again")
            return ended.code
        say(f"slurmctld does not answer, trying again ({error})")
        time.sleep(5)


def say(sentence: str) -> None:
    print(clock(time.time()), sentence, flush=True)


def _ask() -> JobState:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={_job()}", "--Format=RestartCnt:|,State:|,Reason:|"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # a user's own filters
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    restarts, state, reason = answer.stdout.strip().split("|")[:3]
    return JobState(int(restarts), state, reason)


def _job() -> str:
    """This job as squeue and scontrol want it: the number alone may mean a whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _name(step: int) -> str:
    return f"step {step}" if step >= 0 else "the beginning"


def _file(run: Path) -> Path:
    return run / "logs" / f"restarts_{os.environ['SLURM_JOB_ID']}.json"


def _read_starts(run: Path) -> Starts | None:
    try:
        return Starts(**json.loads(_file(run).read_text()))
    except FileNotFoundError:
        return None


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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a job that is preempted or out of time; the decision must still fall
    if arguments.moment == "begin":
        return begin(arguments.run, arguments.max_restarts)
    return end(arguments.run, arguments.max_restarts, arguments.code)


if __name__ == "__main__":
    sys.exit(main())
