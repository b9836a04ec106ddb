"""The state and alarms of operate/watch.py, from lines as a run writes them and a lock that a process really holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from operate.watch import Watched
from tests.runs import ROOT
from train.guard.run_lock import BEAT, RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from train.guard.run_lock import BEAT, RunLock; "
    "RunLock(Path(sys.argv[1])).acquire(); time.sleep(600)"
)


class Folder:
    """A run of 100 epochs of 10 steps, that logs every step and takes a second for each."""

    def __init__(self, path):
        self.path, self.step = path, 0
        self.now = time.time() - 5000
        (path / "config.yaml").write_text("guard: {bad_samples: 10, max_skipped: 20}\n")

    def write(self, after=0.0, **line):
        self.now += after
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**line, "time": self.now}) + "\n")

    def event(self, name, **fields):
        self.write(kind="event", event=name, **{"step": self.step, **fields})

    def start(self, name="start"):
        self.event(name, world_size=2, last=1000, steps_per_epoch=10, startup_seconds=1.0)

    def train(self, count, loss=1.0, speed=100.0, seconds=1.0, lr=0.1, **more):
        for _ in range(count):
            self.step += 1
            pace = {"images_per_second": speed, "data_wait": 0.1, "step_ms": 1000 * seconds, "mfu": None}
            noise = 0.01 * (self.step % 5)
            loss_now = None if loss is None else loss + noise
            fields = {"loss": loss_now, "lr": lr, "grad_norm": 1.0, **pace, **more}
            self.write(kind="train", step=self.step, epoch=self.step / 10, after=seconds, **fields)

    def finish(self, name, text, **fields):
        self.event(name, **fields)
        (self.path / "train.log").write_text(f"2026-01-01 00:00:00 step 1\n2026-01-01 00:00:01 {text}\n")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def alive(folder):
    """The folder's lock, held; by now, nothing has been written for as long as the test's lines are old."""
    lock = RunLock(folder.path)
    lock._record["started"] = folder.now - 10
    lock.acquire()
    yield folder
    lock.release()


def test_progress_pace_and_scores(alive):
    alive.start()
    score = {"weights": "ema", "top5": 90.0, "loss": 1.0, "count": 10, "seconds": 6.0}
    for top1 in (50.0, 70.0, 60.0):
        alive.train(10, seconds=2.0)
        alive.write(kind="eval", step=alive.step, top1=top1, **score, after=6.0)
    alive.train(10, seconds=2.0)
    watched = Watched(alive.path)
    status = watched.look()
    progress = watched.progress
    assert status.state == "running" and status.restarts == 0
    assert progress.step == 40 and progress.seconds_left == pytest.approx(960 * (39 * 2.0 + 3 * 6.0) / 39)
    assert progress.scores() == {"ema": (60.0, 70.0)}
    alive.start("resume")
    alive.step -= 20
    alive.event("resume", world_size=2, last=1000, steps_per_epoch=10, startup_seconds=1.0, lost_steps=20)
    status = watched.look()
    assert watched.progress.step == 20 and status.restarts == 2 and status.lost_steps == 20
    assert watched.progress.scores() == {"ema": (70.0, 70.0)}, "step 30 is still to be taken again"


def test_numbers_that_are_not_finite_are_shown_as_that(alive):
    from launch.watch import page

    alive.start()
    alive.train(2, loss=None, lr=None)
    watched = Watched(alive.path)
    status = watched.look()
    assert "loss not finite   lr not finite   |gradient| 1" in "\n".join(page(watched, status, colours=False))


def test_another_tasks_metric_is_shown_by_its_own_name(alive, monkeypatch):
    """Lower is better, and an evaluation that is not finite is not the best one."""
    from launch.watch import page

    monkeypatch.setenv("COLUMNS", "100")
    error = {"name": "mae", "label": "mean error", "unit": "m", "better": "lower", "primary": True}
    other = {"name": "bias", "label": "bias", "unit": "", "better": "higher", "primary": False}
    fields = {
        "last": 1000,
        "steps_per_epoch": 10,
        "startup_seconds": 1.0,
        "metrics": [other, error],
        "samples": "volumes",
    }
    alive.event("start", world_size=2, **fields)
    alive.train(20)
    for value in (0.5, 0.25, None, 0.375):
        alive.write(kind="eval", step=alive.step, weights="model", mae=value, bias=9.0, count=10, seconds=6.0)
        alive.train(1)
    watched = Watched(alive.path)
    status = watched.look()
    assert watched.progress.scores() == {"model": (0.375, 0.25)}
    lines = page(watched, status, colours=False)
    assert "mean error, m model 0.3750 (best 0.2500)   at step 23" in lines
    assert any("   100 volumes/s" in line or "100 volumes/s   " in line for line in lines), lines
    assert not any(word in "\n".join(lines) for word in ("top-1", "img/s", "bias"))


def test_a_run_that_ends_within_an_epoch(alive):
    from launch.watch import page

    alive.event("start", world_size=2, last=100, steps_per_epoch=93, startup_seconds=1.0)
    alive.train(1)
    watched = Watched(alive.path)
    assert "epoch 0.10 of 1.08   " in "\n".join(page(watched, watched.look(), colours=False))


def test_slow_training_is_not_shown_as_none(alive, monkeypatch):
    from launch.watch import page, summary

    alive.start()
    alive.train(3, speed=0.2401)
    watched = Watched(alive.path)
    speed = next(line for line in page(watched, watched.look(), colours=False) if line.startswith("speed "))
    assert speed.split()[1:3] == ["0.24", "img/s"]
    assert "  0.24 img/s  " in summary(watched.progress)


def alarms(folder):
    return [alarm for alarm in Watched(folder.path).look().alarms if "no line for" not in alarm]


def test_a_healthy_run_has_no_alarm(alive):
    alive.start()
    for epoch in range(50):
        alive.train(10, loss=3.0 / (1 + epoch), speed=100 + epoch % 7)
        alive.event("skipped_step", step=alive.step - 5) if epoch % 10 == 0 else None
        alive.event("checkpoint", seconds=1.0, stall_seconds=0.1)
    assert alarms(alive) == []


def rising(folder):
    folder.train(60, loss=2.0)
    folder.train(20, loss=2.5)


def fallen(folder):
    folder.train(60)
    folder.train(20, speed=60.0, seconds=1.7)


def slower_than_one(folder):
    folder.train(60, speed=0.9)
    folder.train(20, speed=0.24)


def skipped(folder):
    folder.train(50)
    for step in (48, 49, 50):
        folder.event("skipped_step", step=step)


def not_finite(folder):
    folder.train(5)
    folder.train(1, loss=None)


def bad(folder):
    for number in range(6):
        folder.event("bad_sample", split="train", id=number)


def unsaved(folder):
    folder.event("checkpoint", seconds=1.0, stall_seconds=0.1)
    folder.train(5)
    folder.event("save_failed", reason="rank 1: No space left on device")


def slow(folder):
    folder.train(5)
    folder.event("slow_rank", rank=3, seconds=0.9, median=0.2)


def back(folder):
    folder.train(25)
    folder.event("rollback", to=20)
    folder.step = 20
    folder.train(2)


def hung(folder):
    (folder.path / "stacks").mkdir()
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(folder.now))
    (folder.path / "stacks" / "rank_1.txt").write_text(f"{when} rank 1 has been 301 s in step of step 9.\nThread 1:\n")
    folder.now += 10


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (rising, "loss rising: 2.52, it was 2.02"),
        (fallen, "throughput fallen: 60 img/s, it was 100"),
        (slower_than_one, "throughput fallen: 0.24 img/s, it was 0.9 (medians"),
        (skipped, "3 of the last 100 steps were skipped"),
        (not_finite, "the loss of step 6 is not finite"),
        (bad, "6 samples cannot be read; more than 10 end the run"),
        (unsaved, "checkpoint of step 5 not saved: rank 1: No space left on device"),
        (slow, "rank 3 is slow (step 5): 0.90 s of its own a step, the median 0.20 s"),
        (back, "went back from step 25 to 20"),
        (hung, "the watchdog has written stacks/: rank 1 has been 301 s in step of step 9."),
    ],
)
def test_trouble_is_an_alarm_which_goes_when_it_is_over(alive, trouble, words):
    alive.start()
    trouble(alive)
    (alarm,) = alarms(alive)
    assert alarm.startswith(words)
    alive.event("checkpoint", seconds=1.0, stall_seconds=0.1)
    alive.start("resume")
    alive.train(120)
    assert alarms(alive) == []


def test_a_run_that_has_just_gone_back(alive):
    """Until its next line, the time left is that of its newest step. Steps taken again count as not skipped."""
    alive.start()
    alive.train(25, seconds=2.0)
    alive.event("skipped_step")
    alive.event("rollback", to=20)
    watched = Watched(alive.path)
    assert watched.look().state == "running"
    assert (watched.progress.step, watched.progress.seconds_left) == (20, 980 * 2.0)
    assert watched.progress.skipped == []


def test_silence_is_an_alarm_if_the_process_lives(alive):
    """The time since the last line is measured by the clock of the run's node alone."""
    alive.start()
    alive.train(20)
    status = Watched(alive.path).look()
    assert status.state == "running" and status.code == 11 and status.ago > 4000
    assert any(alarm.startswith("no line for 1 h") and "the process lives" in alarm for alarm in status.alarms)
    alive.train(1, seconds=time.time() - alive.now - 30)  # an evaluation, say: lines were as far apart before
    assert not Watched(alive.path).look().alarms


def test_a_clock_that_is_set_changes_no_pace_and_excuses_no_silence(alive):
    alive.start()
    alive.train(20)
    alive.now += 3600
    alive.train(1, clock_set=3600.0)
    alive.train(5)
    watched = Watched(alive.path)
    assert any(alarm.startswith("no line for") for alarm in watched.look().alarms)
    assert watched.progress.seconds_per_step == pytest.approx(1.0) and watched.progress.longest == pytest.approx(1.0)


def test_states_of_a_run_without_a_lock(folder):
    assert Watched(folder.path).look().state == "not started"
    folder.start()
    folder.train(3)
    status = Watched(folder.path).look()
    assert (status.state, status.code) == ("silent", 13)
    for name, fields, state, code in (
        ("preempted", {}, "stopped", 75),
        ("failed", {"code": 65}, "failed", 65),
        ("failed", {"code": 70}, "failed", 70),
        ("failed", {"code": 74}, "failed for now", 74),
        ("finished", {}, "finished", 0),
    ):
        folder.start("resume")
        folder.finish(name, f"this is how it ended: {name}", **fields)
        status = Watched(folder.path).look()
        assert (status.state, status.code, status.why) == (state, code, f"this is how it ended: {name}")
    folder.start("resume")
    folder.train(2)
    (folder.path / "stacks").mkdir()
    for age, sentence in ((9000, "an old hang"), (-5, "rank 1 has been 301 s in step of step 9.")):
        when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(folder.now - age))
        (folder.path / "stacks" / f"rank_{len(sentence)}.txt").write_text(f"{when} {sentence}\nThread 1:\n")
    status = Watched(folder.path).look()
    assert (status.state, status.code, status.why) == ("hung", 71, "rank 1 has been 301 s in step of step 9.")


@pytest.mark.slow
def test_a_suspended_process_is_silent_and_a_young_record_alive(folder):
    """The record of a process that is killed or suspended no longer changes, and nothing more is claimed.

    Its clock may be another node's: only watching shows that.
    """
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], cwd=ROOT)
    try:
        while not (folder.path / ".lock").exists() or not (folder.path / ".lock").read_bytes():
            time.sleep(0.02)
        watched = Watched(folder.path)
        assert watched.look().state == "starting"
        folder.now = time.time()
        folder.start()
        assert watched.look().state == "running"
        holder.send_signal(signal.SIGSTOP)
        seen_silent = Watched(folder.path)
        check_silent(folder, seen_silent)
        holder.send_signal(signal.SIGCONT)
        time.sleep(BEAT + 1)
        assert seen_silent.look().state == "running"
    finally:
        holder.kill()
        holder.wait()
    check_silent(folder, Watched(folder.path))


def check_silent(folder, watched):
    record = json.loads((folder.path / ".lock").read_text())
    (folder.path / ".lock").write_text(
        json.dumps({**record, "beat": record["beat"] + 7200})
    )  # a clock that is two hours ahead
    began = time.monotonic()
    status = watched.look(patient=True)
    assert (status.state, status.code) == ("silent", 13)
    assert "killed, suspended" in status.why and record["host"] in status.why and time.monotonic() - began > 9


def test_a_start_that_ended_before_its_first_line(folder):
    """Say, a config that was refused: the metrics still tell of the start before it."""
    folder.start()
    folder.finish("preempted", "stopped after step 0")
    lock = RunLock(folder.path)
    lock.acquire()
    assert Watched(folder.path).look().state == "starting"
    lock.release()
    status = Watched(folder.path).look()
    assert status.state == "died" and "ended before its first step" in status.why


def test_a_start_that_crashed_after_its_first_line(folder):
    """Its lock is released, but no event says why it ended."""
    lock = RunLock(folder.path)
    lock.acquire()
    folder.now = time.time() + 1
    folder.start()
    lock.release()
    status = Watched(folder.path).look()
    assert (status.state, status.code) == ("died", 13) and "shows why; started again" in status.why


def test_another_run_in_the_same_folder_is_begun_anew(alive):
    alive.start()
    alive.train(30)
    watched = Watched(alive.path)
    assert watched.look().state == "running" and watched.progress.step == 30
    os.remove(alive.path / "metrics.jsonl")
    alive.step = 0
    alive.start()
    alive.train(2)
    watched.look()
    assert watched.progress.step == 2


@pytest.mark.parametrize("name", ["step_00000002.tar", "step_00000002"])
def test_a_file_among_the_checkpoints_is_none(alive, name):
    alive.start()
    alive.train(2)
    (alive.path / "checkpoints").mkdir()
    (alive.path / "checkpoints" / name).write_bytes(b"packed")
    assert Watched(alive.path).look().state == "running"


@pytest.mark.parametrize("text", ["", None])
def test_a_log_that_is_empty_or_missing_says_nothing(folder, text):
    folder.start()
    folder.finish("finished", "done")
    log = folder.path / "train.log"
    log.unlink() if text is None else log.write_text(text)
    status = Watched(folder.path).look(patient=True)
    assert (status.state, status.why) == ("finished", "")
