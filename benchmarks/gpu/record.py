"""What the parts of `make gpu` share: the session, and results that are on disk as soon as they are measured."""

import fcntl
import functools
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.durable import write_atomically

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
Judge = Callable[[list[dict]], tuple[bool, str]]


@dataclass(frozen=True)
class Session:
    """One call of launch/gpu.py.

    work: folder for temporary files. cache: folder of compilers' results and of datasets, which later calls on the same
    machine use again. images: folder of photographs; drawn ones if None. cifar: CIFAR-10, prepared. rehearsal: on the
    CPU, with small sizes.
    """

    work: Path
    output: Path
    cache: Path
    images: Path | None = None
    cifar: Path | None = None
    rehearsal: bool = False

    def size(self, on_gpu: T, rehearsed: T) -> T:
        return rehearsed if self.rehearsal else on_gpu

    @property
    def dataset(self) -> Path:
        """The prepared dataset of full-size JPEGs; it is complete when the file "ready" is in it."""
        return self.cache / f"dataset-{self.size('full', 'small')}-{'given' if self.images else 'drawn'}"

    @property
    def no_dataset(self) -> Path:
        """A file with the reason, if the dataset could not be prepared."""
        return self.work / "no-dataset"

    def waiting(self, pid: int) -> Path:
        """The file that says that the job in process `pid` waits for its turn."""
        return self.work / f"waits-{pid}"

    def turn(self) -> None:
        """Of a job that is timed, when all is compiled: wait until the other jobs are paused. At once the next time."""
        if not self.waiting(os.getpid()).exists():
            self.waiting(os.getpid()).touch()
            if not sys.stdin.readline():
                raise SystemExit("launch/gpu.py has ended")

    def wait_for_dataset(self) -> Path:
        while not (self.dataset / "ready").exists():
            if self.no_dataset.exists():
                raise RuntimeError(f"there is no dataset: {self.no_dataset.read_text()}")
            time.sleep(0.05)
        return self.dataset


class Later:
    """A function of a module of benchmarks/gpu/, "module.function", imported when it is called, with these settings.

    So that the parts can be listed, and missing packages named, before torch and others are imported.
    """

    def __init__(self, name: str, **settings: Any):
        self.module, _, self.name = name.partition(".")
        self.settings = settings

    def __call__(self, *arguments: Any) -> Any:
        module = importlib.import_module(f"benchmarks.gpu.{self.module}")
        return getattr(module, self.name)(*arguments, **self.settings)


@dataclass(frozen=True)
class Part:
    """A part of `make gpu`, which leaves gpu-<name>.json.

    jobs: by name, each run in a process of its own. judge: from the rows, whether all is well and a sentence; it is
    asked after each row. limit: seconds of one job, or until it is ready to be timed. alone: its jobs are timed, with
    nothing beside them, after they have called `Session.turn`.
    """

    name: str
    jobs: dict[str, Callable[[Session, "Record"], None]]
    judge: Judge
    limit: float
    alone: bool = True


@dataclass
class Record:
    """The file gpu-<part>.json: rows, and what is said of them. Several processes may add rows to it.

    Until all jobs have finished, "passed" is false and "unfinished" names them.
    """

    path: Path
    judge: Judge
    command: str = "launch/gpu.py"

    def begin(self, jobs: Sequence[str]) -> None:
        self.path.unlink(missing_ok=True)
        with self._changing() as result:
            result |= {"began": time.time(), "unfinished": list(jobs), "rows": []}

    def add(self, **row: Any) -> None:
        """Write a row now."""
        print(json.dumps(row), flush=True)
        with self._changing() as result:
            result["rows"].append(row)

    def measure(self, name: str, work: Callable[[], dict], **about: Any) -> None:
        """Add what `work` returns as the row `name`; if it fails, a row with the reason, "failed"."""
        try:
            row = work()
        except Exception as error:
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]}
        self.add(name=name, **about, **row)

    def finish(self, job: str, why: str = "") -> None:
        """Mark a job as finished, or note why it did not finish."""
        with self._changing() as result:
            if why:
                result.setdefault("problems", {})[job] = why
            else:
                result["unfinished"].remove(job)

    def read(self) -> dict:
        return json.loads(self.path.read_text())

    @contextmanager
    def _changing(self) -> Iterator[dict]:
        where = about(self.command)  # imports torch at first
        with locked(self.path.parent):
            result = self.read() if self.path.exists() else {}
            yield result
            _judge(result, self.judge)
            result |= {**where, "seconds": round(time.time() - result["began"], 1)}
            write_atomically(self.path, (json.dumps(result, indent=1) + "\n").encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While no other process changes a record in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
        yield
    finally:
        os.close(descriptor)


def _judge(result: dict, judge: Judge) -> None:
    """Set "passed" and "says". If rows are missing, `judge` raises an error, and the part has not passed."""
    rows = [row for row in result["rows"] if "failed" not in row]
    try:
        passed, says = judge(rows)
    except (LookupError, ValueError, ArithmeticError):  # rows that it needs are not there yet
        passed, says = False, f"{len(rows)} rows"
    broken = [f"{row['name']} failed" for row in result["rows"] if "failed" in row]
    problems = result.get("problems", {})
    missing = [f"{job}: {problems.get(job, 'not finished')}" for job in result["unfinished"]]
    result["passed"] = passed and not broken and not missing
    result["says"] = "; ".join([says, *broken, *missing])


@functools.cache
def about(command: str) -> dict[str, str]:
    """Where and when a result was measured."""
    import torch  # noqa: F401 (machine() then names the GPU)

    from benchmarks.environment import machine, versions

    return {"command": command, "date": date.today().isoformat(), "machine": machine(), **versions()}


def installed(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def cores() -> int:
    return len(os.sched_getaffinity(0))
