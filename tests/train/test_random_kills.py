"""kill -9 of one or all ranks at random (seeded) moments of start-up, steps, evaluations and saves."""

import os
import random
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.oracle import assert_same_state, ids_by_step, scores, state
from tests.runs import events, losses, metrics, run, start
from train.telemetry.goodput import read_lines

SETTINGS, STEPS = ["train.epochs=4", "checkpoint.every_steps=3"], 32


def run_with_kills(
    config: Path, output: Path, settings: Sequence[str], dice: random.Random, duration: float, most: int
) -> list[tuple[int, float]]:
    """Run two ranks to the end, killing one or both of them up to `most` times at random moments within `duration` s.

    Returns for each kill the number of steps that were finished, and the time.
    """
    kills = []
    while True:
        job = start(config, output, *settings, world=2)
        if len(kills) < most:
            moment, victims = dice.uniform(0, duration), dice.choice([[0], [1], [0, 1]])
            job.processes[0].join(moment)
            alive = [rank for rank in victims if job.processes[rank].exitcode is None]
            for rank in alive:
                os.kill(job.processes[rank].pid, signal.SIGKILL)
            if alive:
                job.wait_for_death(alive[0])
                kills.append((len(metrics(output, "train", missing_ok=True)), time.time()))
                continue
        assert job.wait() == [0, 0], job.text()
        return kills


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_killed_at_random_moments(tiny_config, tmp_path, kills, record_property):
    """Runs are killed and restarted until they finish, until there were `kills`. Each ends like the undisturbed run."""
    whole, dice = tmp_path / "whole", random.Random(20261120)
    began = time.monotonic()
    run(tiny_config, whole, *SETTINGS, world=2)
    duration = time.monotonic() - began

    done, runs, repeated, moments, recoveries = 0, 0, 0, [], []
    while done < kills:
        output, runs = tmp_path / f"run{runs}", runs + 1
        found = run_with_kills(tiny_config, output, SETTINGS, dice, duration, kills - done)
        done += len(found)
        moments += [steps for steps, _ in found]
        killed_at = [when for _, when in found]
        assert losses(output) == losses(whole)
        assert_same_state(state(output, STEPS), state(whole, STEPS))
        taken = ids_by_step(output, world=2)
        assert taken == ids_by_step(whole, world=2)
        for epoch in range(4):
            ids = [i for step in range(8 * epoch + 1, 8 * epoch + 9) for i in taken[step]]
            assert len(ids) == len(set(ids)) == 256
        assert scores(output) == scores(whole)
        repeated += sum(line["lost_steps"] for name in ("start", "resume") for line in events(output, name))
        times = sorted(line["time"] for line in read_lines(output / "metrics.jsonl") if line["kind"] == "train")
        recoveries += [
            next(moment for moment in times if moment > killed) - killed for killed in killed_at if times[-1] > killed
        ]
    record_property("runs", runs)
    record_property("kills", done)
    record_property("steps taken again", repeated)
    record_property("steps taken at each kill", moments)
    record_property("seconds from a kill to the next finished step, median", round(statistics.median(recoveries), 1))
    record_property("seconds from a kill to the next finished step, largest", round(max(recoveries), 1))
    assert kills < 50 or (min(moments) == 0 and max(moments) > 24), moments
