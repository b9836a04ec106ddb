"""Jobs of launch/gpu.py: side by side while they compile, alone while they are timed, ended at their limits."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.jobs import Job, in_order, record, run_jobs, take_turns
from benchmarks.gpu.record import Later, Part, Session

ROOT = Path(__file__).resolve().parents[3]

# A job that works, takes its turn if it is to be timed, and works again; each moment of work is a line in a file.
WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmarks.gpu.record import Session
folder, name, alone, moments = Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "True", int(sys.argv[5])
def work(what):
    for _ in range(moments):
        with open(folder / "lines", "a") as file:
            file.write(json.dumps([name, what]) + chr(10))
        time.sleep(0.02)
work("compiles")
if alone:
    Session(folder, folder, folder).turn()
    work("is timed")
"""


def part(name: str, jobs: int, alone: bool, limit: float = 60) -> Part:
    judge = lambda rows: (True, "fine")  # noqa: E731
    return Part(name, {f"{name}{number}": Later("none.none") for number in range(jobs)}, judge, limit, alone)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Session; its jobs run WORKER for `moments[name]` moments, by default 10."""
    session, moments = Session(tmp_path, tmp_path, tmp_path), {}

    def start(job: Job, session: Session, environment: dict[str, str]) -> None:
        job.log = tmp_path / f"{job.name}.log"
        job.log.touch()
        settings = [str(ROOT), str(tmp_path), job.name, str(job.part.alone), str(moments.get(job.name, 10))]
        job.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *settings], stdin=subprocess.PIPE, start_new_session=True
        )
        job.until = time.monotonic() + job.part.limit

    monkeypatch.setattr(Job, "start", start)
    return session, moments


def lines(session: Session) -> list[list[str]]:
    return [json.loads(line) for line in (session.work / "lines").read_text().splitlines()]


def test_jobs_that_are_timed_have_the_machine_to_themselves(started):
    session, moments = started
    moments["other0"] = 400  # goes on before, between and after the turns
    parts = [part("timed", 2, alone=True), part("other", 1, alone=False)]
    run_jobs(session, {}, parts, time.monotonic() + 300, places=4)
    found = lines(session)
    for name in ("timed0", "timed1"):
        first = found.index([name, "is timed"])
        assert found[first : first + 10] == [[name, "is timed"]] * 10  # no line of another job
    assert found.count(["other0", "compiles"]) == 400
    assert all(json.loads((session.output / f"gpu-{name}.json").read_text())["passed"] for name in ("timed", "other"))


def test_more_jobs_than_places_wait_for_one(started):
    session, _ = started
    run_jobs(session, {}, [part("timed", 6, alone=True)], time.monotonic() + 300, places=4)
    found = lines(session)
    assert found.index(["timed4", "compiles"]) > found.index(["timed3", "is timed"])
    assert sum(what == "is timed" for _, what in found) == 60


def test_a_job_is_ended_at_its_limit_and_the_others_go_on(started):
    session, moments = started
    moments["slow0"] = 10**6
    run_jobs(
        session,
        {},
        [part("slow", 1, alone=True, limit=1), part("timed", 1, alone=True)],
        time.monotonic() + 300,
        places=4,
    )
    slow, timed = (json.loads((session.output / f"gpu-{name}.json").read_text()) for name in ("slow", "timed"))
    assert not slow["passed"] and slow["says"] == "fine; slow0: not done in time"
    assert timed["passed"] and lines(session).count(["timed0", "is timed"]) == 10


def test_a_job_that_is_ready_does_not_wait_for_those_that_compile(started):
    session, moments = started
    moments["slow0"] = 10**6
    run_jobs(session, {}, [part("slow", 1, alone=True), part("timed", 1, alone=True)], time.monotonic() + 12, places=4)
    assert lines(session).count(["timed0", "is timed"]) == 10
    assert "slow0: not done in time" in json.loads((session.output / "gpu-slow.json").read_text())["says"]


def test_a_warning_of_torch_about_barriers_fails_the_part(tmp_path):
    session, job = Session(tmp_path, tmp_path, tmp_path), Job(part("train", 1, alone=False), "train0")
    job.log = tmp_path / "log"
    record(session, job.part).begin(["train0"])
    code = "import warnings; warnings.warn('barrier(): using the device under current context.')"
    with open(job.log, "w") as log:
        job.process = subprocess.Popen([sys.executable, "-c", code], stderr=log)
    job.report(session)
    found = record(session, job.part).read()
    assert not found["passed"] and "UserWarning: barrier(): using the device" in found["says"]


def test_every_part_has_something_early():
    found = [job.name for job in in_order([part("a", 3, alone=True), part("b", 1, alone=False)])]
    assert found == ["a0", "b0", "a1", "a2"]


def test_time_stands_still_for_a_job_that_waits_for_its_turn(started):
    session, moments = started
    ready = []

    def preparing() -> bool:  # until longer than the job's limit after it is ready
        if (session.work / "lines").exists():
            ready.append(time.monotonic())
        return not ready or time.monotonic() < ready[0] + 10

    run_jobs(session, {}, [part("quick", 1, alone=True, limit=8)], time.monotonic() + 300, 4, preparing)
    assert lines(session).count(["quick0", "is timed"]) == 10


def test_no_job_is_paused_while_it_changes_a_record(started):
    session, moments = started
    moments["other0"] = 100
    holder = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from benchmarks.gpu.record import locked\n"
        "with locked(Path(sys.argv[2])): Path(sys.argv[2], 'holds').touch(); time.sleep(1);"
        "    Path(sys.argv[2], 'held').touch()"
    )
    holding = subprocess.Popen([sys.executable, "-c", holder, str(ROOT), str(session.output)])
    while not (session.output / "holds").exists():
        time.sleep(0.01)
    seen = []
    other = Job(part("other", 1, alone=False), "other0")
    other.start(session, {})
    other.pause = lambda: seen.append((session.output / "held").exists())
    other.resume = lambda: None
    take_turns(session, [], [other], time.monotonic() + 60)
    other.ended(0)
    assert holding.wait() == 0 and seen == [True]


def test_jobs_end_with_the_process_that_runs_them(started):
    session, moments = started
    moments["slow0"] = 10**6

    def interrupt() -> bool:
        if (session.work / "lines").exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_jobs(session, {}, [part("slow", 1, alone=True)], time.monotonic() + 300, places=4, preparing=interrupt)
    count = len(lines(session))
    time.sleep(0.2)
    assert len(lines(session)) == count
