"""The watchdog over real processes: frozen, stuck, dead, suspended and slow to stop.

All scenarios run at once, as they mostly wait.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from tests.runs import _forkserver  # it has imported torch
from train.guard.watchdog import FROZEN, JUDGING, Beat, Watchdog, _Judge, _Place, _Stopwatch, blame

LIMIT = 4.0  # seconds for a step


def _rank(rank, world, port, output, stuck):
    """A run: 100 steps of an all-reduce.

    Rank 1 never finishes its part of the sixth if there is a function `stuck` in it.
    """
    stream = open(output / f"stderr_{rank}", "w", buffering=1)
    os.dup2(stream.fileno(), 2)
    sys.stderr = stream
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    limits = {"startup": 60.0, "first_step": 60.0, "step": LIMIT, "evaluation": 60.0, "save": 60.0}
    watchdog = Watchdog(rank, world, limits, output / "stacks", grace=1.0)
    try:
        _train(rank, output, watchdog, stuck)
    except RuntimeError:
        watchdog.settle()
        raise
    watchdog.close()


def _train(rank, output, watchdog, stuck):
    import torch
    import torch.distributed as dist

    from train.guard.rank_store import Store

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    watchdog.connect(Store())
    for step in range(1, 101):
        watchdog.enter("first_step" if step == 1 else "step", step)
        time.sleep(0.05)
        if step == 6 and rank == 1 and stuck:
            stuck(output)
        dist.all_reduce(torch.ones(10))
        (output / f"step_{rank}").write_text(str(step))
    dist.destroy_process_group()


def _never_ends(output):
    (output / "stuck").touch()
    while True:
        time.sleep(0.05)


def _never_lets_go(output):
    ctypes.PyDLL(None).sleep(600)  # in C, holding the GIL


def _starts_alone(output, port):
    """Rank 0 of two; the other never starts."""
    stream = open(output / "stderr_0", "w", buffering=1)
    os.dup2(stream.fileno(), 2)
    sys.stderr = stream
    watchdog = Watchdog(0, 2, {"startup": 3.0}, output / "stacks", grace=1.0)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
    watchdog.close()


def _does_not_stop(output):
    stream = open(output / "stderr_0", "w", buffering=1)
    os.dup2(stream.fileno(), 2)
    sys.stderr = stream
    watchdog = Watchdog(0, 1, {"startup": 60.0}, output / "stacks", grace=2.0)
    watchdog.stop_by(time.monotonic() + 2)
    time.sleep(600)


@dataclass
class Job:
    output: Path
    processes: list

    @classmethod
    def start(cls, output, world=2, stuck=None):
        port = _free_port()
        return cls(output, []).run(*[(_rank, (rank, world, port, output, stuck)) for rank in range(world)])

    def run(self, *calls):
        for target, arguments in calls:
            self.processes.append(_forkserver.Process(target=target, args=arguments))
            self.processes[-1].start()
        return self

    def until(self, name, least=0, timeout=120):
        """Wait for the file `name`, and for the step in it to be `least`."""
        path, deadline = self.output / name, time.monotonic() + timeout
        while not path.exists() or int(path.read_text() or 0) < least:
            assert time.monotonic() < deadline, f"{name}: not {least} within {timeout} s"
            time.sleep(0.02)

    def send(self, number, *ranks):
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def wait(self, *ranks, timeout=120):
        """Exit codes of `ranks`, or of all."""
        processes = [self.processes[rank] for rank in ranks] or self.processes
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        if None in codes or not ranks:
            for process in self.processes:
                process.kill()
        return codes

    def said(self, rank):
        return [
            line for line in (self.output / f"stderr_{rank}").read_text().splitlines() if line.startswith("error: ")
        ]

    def stacks(self, rank):
        return (self.output / "stacks" / f"rank_{rank}.txt").read_text()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def frozen(output, rank):
    job = Job.start(output)
    job.until(f"step_{rank}", 5)
    job.send(signal.SIGSTOP, rank)
    codes = job.wait(1 - rank)
    job.send(signal.SIGCONT, rank)
    return job, codes + job.wait(rank)


def frozen_0(output):
    return frozen(output, 0)


def frozen_1(output):
    return frozen(output, 1)


def stuck(output):
    job = Job.start(output, world=3, stuck=_never_ends)
    return job, job.wait()


def gil_held(output):
    (output / "stacks").mkdir()
    os.mkfifo(output / "stacks" / "rank_0.txt")  # opening it blocks, as on a disk that hangs
    job = Job.start(output, stuck=_never_lets_go)
    return job, job.wait(0) + job.wait(1, timeout=0)  # a launcher would kill the other


def keeper_of_the_store_dead(output):
    (output / "stacks").touch()  # where the folder should be
    job = Job.start(output, stuck=_never_ends)
    job.until("stuck")
    job.send(signal.SIGKILL, 0)
    return job, job.wait(1)


def suspended(output):
    """Both ranks are stopped, one after the other, for longer than the limit of a step, and then run to the end."""
    job = Job.start(output)
    job.until("step_0", 5)
    job.send(signal.SIGSTOP, 0)
    time.sleep(1)
    job.send(signal.SIGSTOP, 1)
    time.sleep(LIMIT + FROZEN)
    job.send(signal.SIGCONT, 0)
    time.sleep(1)
    job.send(signal.SIGCONT, 1)
    return job, job.wait()


def alone(output):
    job = Job(output, []).run((_starts_alone, (output, _free_port())))
    return job, job.wait()


def not_stopped(output):
    job = Job(output, []).run((_does_not_stop, (output,)))
    return job, job.wait()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    scenarios = (frozen_0, frozen_1, stuck, gil_held, keeper_of_the_store_dead, suspended, alone, not_stopped)
    with ThreadPoolExecutor(len(scenarios)) as pool:
        yield {
            scenario.__name__: pool.submit(scenario, tmp_path_factory.mktemp(scenario.__name__))
            for scenario in scenarios
        }


@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_rank_is_named_and_ends_when_it_wakes_up(outcomes, rank):
    job, codes = outcomes[f"frozen_{rank}"].result()
    assert codes == [71, 71]
    (line,) = job.said(1 - rank)
    assert (
        line.startswith(f"error: hung: rank {1 - rank} has been ") and f"Silent, so frozen or dead: rank {rank}" in line
    )
    sentence, *stack = job.stacks(1 - rank).splitlines()
    assert f"rank {rank}" in sentence and any("in all_reduce" in frame for frame in stack)
    assert job.said(rank)[0].startswith("error: hung: ") and "Current thread" in job.stacks(rank)


def test_stuck_rank_is_named_as_furthest_behind(outcomes):
    job, codes = outcomes["stuck"].result()
    assert codes == [71, 71, 71]
    lines = [job.said(rank) for rank in range(3)]
    for (line,) in lines:
        assert "furthest behind: rank 1 (" in line and "in step of step 6, at _never_ends (test_watchdog.py:" in line
    assert "in _never_ends" in job.stacks(1) and "in all_reduce" in job.stacks(0)


def test_rank_that_holds_the_gil_is_named_though_the_stacks_cannot_be_written(outcomes):
    job, codes = outcomes["gil_held"].result()
    assert codes == [71, None]
    assert "Silent, so frozen or dead: rank 1 (" in job.said(0)[0]


def test_without_the_store_a_rank_ends_by_its_own_limit(outcomes):
    job, codes = outcomes["keeper_of_the_store_dead"].result()
    assert codes == [71]
    assert "Rank 0 is dead" in job.said(1)[0] and "so the stacks are here:" in job.said(1)[1]
    assert "in _never_ends" in (job.output / "stderr_1").read_text()


def test_suspended_job_goes_on(outcomes):
    job, codes = outcomes["suspended"].result()
    assert codes == [0, 0]
    assert (job.output / "step_1").read_text() == "100" and not job.said(0) and not job.said(1)


def test_missing_rank_ends_the_start(outcomes):
    job, codes = outcomes["alone"].result()
    assert codes == [71]
    assert "in startup (limit 3 s)" in job.said(0)[0] and "a rank or its node is missing" in job.said(0)[0]
    assert "init_process_group" in job.stacks(0)


def test_grace_exceeded(outcomes):
    job, codes = outcomes["not_stopped"].result()
    assert codes == [75]
    assert job.said(0) == [
        "error: not stopped within guard.grace 2 s: leaving without a save, the last checkpoint counts"
    ]


def beat(count, section="step", step=7, *, place="all_reduce (c.py:1)", waiting=True, completed=6):
    return Beat(count, section, step, 5.0, place, waiting, completed)


@pytest.mark.parametrize(
    "first, second, sentence",
    [
        (
            [beat(1), beat(1), beat(1)],
            [beat(4), beat(1), None],
            "at all_reduce (c.py:1), step 6 complete); rank 2 (no heartbeat so far).",
        ),
        ([beat(1), None], [beat(4), beat(1)], "All ranks live; furthest behind: rank 0"),
        ([beat(1), beat(1)], [beat(4), beat(4, step=6)], "furthest behind: rank 1 (5 s in step of step 6"),
        (
            [beat(1), beat(1)],
            [beat(4, "save"), beat(4, "evaluation")],
            "furthest behind: rank 1 (5 s in evaluation of step 7",
        ),
        (
            [beat(1), beat(1)],
            [beat(4), beat(4, place="next (f.py:2)", waiting=False)],
            "behind: rank 1 (5 s in step of step 7, at next",
        ),
        ([beat(1)] * 3, [beat(4), beat(4, place="wait (g.py:2)"), beat(4)], "furthest behind: rank 1 ("),
        (
            [beat(1)] * 9,
            [beat(4)] * 9,
            "; rank 3 (5 s in step of step 7, at all_reduce (c.py:1), step 6 complete) and 5 more.",
        ),
        # All hosts wait for their devices, of which one is behind.
        (
            [beat(1)] * 3,
            [beat(4), beat(4), beat(4, completed=5)],
            "behind: rank 2 (5 s in step of step 7, at all_reduce",
        ),
    ],
)
def test_blame(first, second, sentence):
    assert sentence in blame(first, second)


class Shelf(dict):
    """The part of the store that `_Judge` uses."""

    set_once = dict.setdefault


def test_one_judges_and_the_next_where_no_sentence_comes():
    shelf, place = Shelf(), _Place("step", 7, 0.0, 4.0)
    first, second, third = (_Judge(shelf, name) for name in "123")
    assert [judge.is_me(place, 10) for judge in (first, second, third)] == [True, False, False]
    assert first.is_me(place, 11) and not any(second.is_me(place, now) for now in (11, 12, 10 + JUDGING))
    assert second.is_me(place, 10.5 + JUDGING) and not third.is_me(place, 11 + JUDGING)  # the first has not reported
    assert third.is_me(place, 12 + 2 * JUDGING)  # nor has the second
    other = _Place("evaluation", 7, 90.0, 4.0)
    assert third.is_me(other, 100) and not _Judge(shelf, "4").is_me(other, 100)  # another section, another judge
    # Entered again, while the previous judge lives but does not report.
    later = _Place("evaluation", 7, 200.0, 4.0)
    assert not second.is_me(later, 300) and second.is_me(later, 301 + JUDGING)


def test_the_first_batch_that_is_evaluated_may_compile(tmp_path):
    limits = {"startup": 60.0, "first_step": 50.0, "step": 4.0, "evaluation": 3.0, "save": 5.0}
    watchdog = Watchdog(0, 1, limits, tmp_path, grace=1.0)
    found = []
    for section in ("first_step", "step", "evaluation", "evaluation", "step", "evaluation"):
        watchdog.enter(section, 1)
        found.append(watchdog._place.limit)
    watchdog.close()
    assert found == [50, 4, 50, 3, 4, 3]


def test_time_stopped_is_left_out():
    watch = _Stopwatch()
    assert watch.read(100, 101, 0.5) == 1
    assert watch.read(100, 1000, 899) == 1  # stopped for 899 s
    assert watch.read(100, 1001, 1) == 2
    assert watch.read(999, 2000, 999) == pytest.approx(2, abs=2)  # entered at the end of one stop, before the next
    assert watch.read(2990, 3000, 1000) == 0  # entered just after waking, before this thread looked


def test_the_stacks_are_written_though_nothing_can_be_printed(tmp_path, monkeypatch):
    """The disk of the log is full, or the terminal is closed."""
    watchdog = Watchdog(0, 1, {"startup": 60.0}, tmp_path / "stacks", grace=1.0)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        watchdog._report_hang("rank 0 has been 5 s in step of step 9.")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    watchdog.close()
    stacks = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "rank 0 has been 5 s" in stacks and "test_the_stacks_are_written" in stacks
