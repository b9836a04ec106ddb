"""The ledger of a run's time: computed by hand, on random histories, and on a run that is killed."""

import random
import time
from pathlib import Path

import pytest

from operate.run_folder import RunLog
from tests.runs import run, start
from train.telemetry.goodput import CATEGORIES, Ledger, goodput, read_lines


def ledger_of(lines):
    ledger = Ledger()
    for line in lines:
        ledger.add(line)
    return ledger


def event(at, name, step, **fields):
    return {"kind": "event", "event": name, "step": step, **fields, "time": at}


def steps(at, step, step_ms, data_wait):
    return {"kind": "train", "step": step, "loss": 1.0, "step_ms": step_ms, "data_wait": data_wait, "time": at}


def evaluated(at, step, seconds, weights="model"):
    return {"kind": "eval", "step": step, "weights": weights, "seconds": seconds, "time": at}


# A run that begins at 1000 and ends at 1050; its usual step is 0.9 s and 0.1 s of waiting for data.
KILLED_ONCE = [
    event(1009.0, "start", 0, startup_seconds=9.0, world_size=2, lost_steps=0),  # 1 s before its first step
    steps(1015.0, 1, 5000, 0.2),  # 4 s and 1 s of waiting: 3.1 s more than usual
    steps(1017.0, 3, 1000, 0.1),
    evaluated(1019.0, 3, 2.0),
    evaluated(1021.0, 3, 2.0, "ema"),
    event(1022.0, "checkpoint", 3, seconds=1.0, stall_seconds=0.5),
    steps(1023.5, 5, 1000, 0.1),  # 2 s, which are taken again
    # Killed at 1025.5, 2 s after its last train line; started again at 1035.5.
    event(1043.5, "resume", 3, startup_seconds=8.0, world_size=2, lost_steps=3, down_seconds=10.0),
    steps(1046.4, 4, 2900, 0.0),  # 2 s more than usual
    steps(1048.4, 6, 1000, 0.1),
    event(1049.0, "checkpoint", 6, seconds=0.6, stall_seconds=0.6),
    event(1050.0, "finished", 6),
]
KILLED_ONCE_SECONDS = {
    "productive": 6 * 0.9,
    "startup": 10.0 + 8.0,
    "compilation": 3.1 + 2.0,
    "data_wait": 1.0 + 0.2 + 0.2,
    "checkpoint_stall": 0.5 + 0.6,
    "evaluation": 4.0,
    "lost": 2.0 + 2.0,
    "waiting": 10.0,
    "other": 1.0,
}


def test_a_history_worked_out_by_hand():
    ledger = ledger_of(KILLED_ONCE)
    split = ledger.split()
    assert tuple(split) == CATEGORIES and split == pytest.approx(KILLED_ONCE_SECONDS)
    assert sum(split.values()) == pytest.approx(50.0) and goodput(split) == pytest.approx(5.4 / 50)
    assert ledger.lost_steps == 3 and len(ledger.starts) == 2
    assert ledger.line() == {
        "kind": "goodput",
        "step": 6,
        "goodput": 0.108,
        **{category: pytest.approx(seconds) for category, seconds in KILLED_ONCE_SECONDS.items()},
    }


def test_until_a_sign_of_life_after_the_last_line():
    assert ledger_of(KILLED_ONCE).split(1053.0) == pytest.approx({**KILLED_ONCE_SECONDS, "other": 4.0})
    assert ledger_of(KILLED_ONCE).split(1020.0) == pytest.approx(KILLED_ONCE_SECONDS)  # an older one


def test_a_resume_between_two_train_lines_divides_their_steps():
    """Lines every 10 steps, a checkpoint at step 14, killed after step 20: 4 of the second line's 10 steps count."""
    lines = [
        event(100.0, "start", 0, startup_seconds=0.0),
        steps(101.0, 1, 1000, 0.5),
        steps(110.0, 10, 1000, 0.5),
        steps(120.0, 20, 1000, 0.5),
        event(125.0, "resume", 14, startup_seconds=5.0),
    ]
    ledger = ledger_of(lines)
    split = ledger.split()
    assert (split["productive"], split["data_wait"], split["lost"], split["startup"]) == pytest.approx(
        (7.0, 7.0, 6.0, 5.0)
    )
    assert ledger.lost_steps == 6 and split["other"] == pytest.approx(0.0)


def test_steps_after_the_last_train_line_count_as_far_as_they_were_saved():
    """Lines every 10 steps; killed 9 s after step 10's line, with a checkpoint of step 14.

    The second start is stopped by request after step 17.
    """
    lines = [
        event(100.0, "start", 0, startup_seconds=0.0),
        steps(101.0, 1, 1000, 0.0),
        steps(110.0, 10, 1000, 0.0),
        event(115.0, "checkpoint", 14, seconds=1.0, stall_seconds=0.5),
        event(130.0, "resume", 14, startup_seconds=1.0, down_seconds=10.0, lost_steps=4),
        steps(131.0, 15, 1000, 0.0),
        event(135.0, "preempted", 17),
        event(140.0, "resume", 17, startup_seconds=1.0, down_seconds=3.0, lost_steps=0),
    ]
    ledger = ledger_of(lines)
    split = ledger.split()
    assert split == pytest.approx(
        {
            **dict.fromkeys(CATEGORIES, 0.0),
            "productive": 10.0 + 4.0 + 1.0 + 2.0,
            "startup": 2.0,
            "checkpoint_stall": 0.5,
            "lost": 9.0 - 4.0 - 0.5,
            "waiting": 10.0 + 3.0,
            "other": 3.0,  # saving and leaving, after step 17
        }
    )
    assert ledger.lost_steps == 4 and [start.end for start in ledger.starts] == [None, "preempted", None]


def test_a_rollback_loses_steps_without_a_restart():
    lines = [
        event(100.0, "start", 0, startup_seconds=0.0),
        steps(101.0, 1, 1000, 0.0),
        steps(106.0, 6, 1000, 0.0),
        event(108.0, "rollback", 8, steps=[7, 8], to=4),
        steps(109.0, 5, 1000, 0.0),
        steps(114.0, 10, 1000, 0.0),
    ]
    ledger = ledger_of(lines)
    assert ledger.split() == pytest.approx({**dict.fromkeys(CATEGORIES, 0.0), "productive": 10.0, "lost": 4.0})
    assert ledger.lost_steps == 4 and len(ledger.starts) == 1


def test_a_start_that_died_before_its_first_line_is_waiting():
    """`down_seconds` counts from the last sign of life of the start that began at `previous_started`."""
    lines = [
        event(100.0, "start", 0, startup_seconds=0.0),
        steps(101.0, 1, 1000, 0.0),
        event(1001.0, "resume", 0, startup_seconds=1.0, down_seconds=5.0, previous_started=950.0, lost_steps=1),
    ]
    split = ledger_of(lines).split()
    assert split["waiting"] == pytest.approx(899.0) and split["lost"] == pytest.approx(1.0)


def moved(lines, seconds):
    return [{**line, "time": line["time"] + seconds} for line in lines]


@pytest.mark.parametrize("hour", [-3600.0, -20.0])
def test_a_start_on_a_node_whose_clock_is_behind(hour):
    """Nothing but the wait, which cannot be known, differs: not before, within or after that start."""
    first, second = KILLED_ONCE[:7], moved(KILLED_ONCE[7:], hour)
    second[0] = {**second[0], "down_seconds": 10.0 + hour, "host": "b"}
    third = [event(1060.0, "resume", 6, startup_seconds=5.0, down_seconds=1055.0 - (1050.0 + hour), lost_steps=0)]
    split = ledger_of(first + second + third).split()
    assert split == pytest.approx({**KILLED_ONCE_SECONDS, "waiting": 5.0 + 10.0, "startup": 18.0 + 5.0})
    log = RunLog()
    for line in first + second:
        log.add(line)
    hours = [line.hours for line in (*log.train, log.events[-1])]
    assert hours == sorted(hours) and log.endings(Path("/nowhere")) == ["killed", "finished"]


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set_during_a_start(jump):
    """The next start on that machine has the corrected clock, too."""
    after = [{**KILLED_ONCE[3], "clock_set": jump}, *KILLED_ONCE[4:]]
    split = ledger_of(KILLED_ONCE[:3] + moved(after, jump)).split(1053.0 + jump)
    assert split == pytest.approx({**KILLED_ONCE_SECONDS, "other": 4.0})


def test_a_process_that_began_while_the_one_before_it_was_ending():
    """Its time until then is the other one's. So it is if one Python process trains twice."""
    lines = [
        event(100.0, "start", 0, startup_seconds=0.0),
        steps(101.0, 1, 1000, 0.0),
        steps(110.0, 10, 1000, 0.0),
        event(110.0, "preempted", 10),
        event(112.0, "resume", 10, startup_seconds=12.0, down_seconds=-10.0, lost_steps=0),
    ]
    assert ledger_of(lines).split() == pytest.approx(
        {**dict.fromkeys(CATEGORIES, 0.0), "productive": 10.0, "startup": 2.0}
    )


def test_lines_without_a_time_are_left_out_and_counted():
    old = [{key: value for key, value in line.items() if key != "time"} for line in KILLED_ONCE]
    ledger = ledger_of(old)
    assert ledger.split() == {} and ledger.left_out == len(old)
    ledger = ledger_of(old[:7] + KILLED_ONCE[7:])
    assert ledger.left_out == 7 and sum(ledger.split().values()) == pytest.approx(1050 - 1035.5)


def random_history(seed):
    """Lines of a run that is stopped, killed and rolled back at random, with jumps of its clock and inexact times."""
    dice = random.Random(seed)
    now, taken, lines = 1e9, 0, []
    for number in range(dice.randint(1, 6)):
        step = dice.randint(0, taken)
        now += dice.choice((0.0, dice.uniform(0, 100), -5.0))
        fields = {"startup_seconds": dice.uniform(0, 30), "down_seconds": dice.choice((None, dice.uniform(0, 100)))}
        lines.append(event(now, "resume" if number else "start", step, **fields))
        for _ in range(dice.randint(0, 12)):
            count, seconds = dice.randint(1, 3), dice.uniform(0.1, 2)
            now += count * seconds * dice.uniform(0.8, 1.3)
            step += count
            taken = max(taken, step)
            lines.append(steps(now, step, 1000 * seconds, dice.random()))
            if dice.random() < 0.2:
                now += dice.uniform(0, 3)
                lines.append(evaluated(now, step, dice.uniform(0, 3)))
                lines.append(event(now, "checkpoint", max(0, step - 1), seconds=9.0, stall_seconds=dice.uniform(0, 1)))
            if dice.random() < 0.1:
                to = dice.randint(0, step)
                lines.append(event(now, "rollback", step, steps=[step], to=to))
                step = to
        if dice.random() < 0.3:
            lines.append(event(now, "preempted", step))
    return lines


def test_all_seconds_are_in_one_category_whatever_happened():
    for seed in range(300):
        ledger = Ledger()
        for line in random_history(seed):
            ledger.add(line)
            split = ledger.split()
            assert all(seconds >= 0 for seconds in split.values()), (seed, split)
            total = ledger.starts[-1].last - ledger.starts[0].began
            assert sum(split.values()) == pytest.approx(total, abs=1e-5), (seed, split)


@pytest.mark.slow
def test_a_run_killed_twice(tiny_config, tmp_path):
    """kill -9 after steps 5 and 11 of 16, checkpoints every 3, a second of nothing before each restart."""
    settings, pause = ["checkpoint.every_steps=3", "train.evaluate_every=1"], 1.0
    job = start(tiny_config, tmp_path, *settings)
    began = time.time()
    job.kill_at(5)
    time.sleep(pause)
    start(tiny_config, tmp_path, *settings).kill_at(11)
    time.sleep(pause)
    run(tiny_config, tmp_path, *settings)
    wall = time.time() - began

    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    lost, taken = 0, 0
    for line in lines:
        if line.get("event") == "resume":
            lost += taken - line["step"]
        elif line["kind"] == "train":
            taken = line["step"]
    ledger = ledger_of(lines)
    split = ledger.split()
    assert len(ledger.starts) == 3 and ledger.lost_steps == lost > 0
    assert wall - 5 < sum(split.values()) < wall + 1, (split, wall)  # the last one's leaving is not in it
    assert split["waiting"] >= 2 * pause
    assert all(seconds > 0 for seconds in split.values()), split

    # The last line, written from the run's memory, agrees with the ledger of the whole file.
    assert lines[-1]["kind"] == "goodput"
    before = ledger_of(lines[:-1])
    assert {key: value for key, value in lines[-1].items() if key != "time"} == before.line()

    # So do the curves, in which repeated steps replace the old ones.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("learning/loss")] == list(range(1, 17))
    for category in CATEGORIES:
        share = before.split()[category] / sum(before.split().values())
        assert events.Scalars(f"goodput/{category}")[-1].value == pytest.approx(share, abs=1e-3)
