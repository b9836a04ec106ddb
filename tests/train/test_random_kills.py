"""kill -9 at random moments, of one rank or of all: start-up, steps, evaluations and saves included. The moments are seeded."""

import os
import random
import signal
import time

import pytest

from tests.runs import losses, metrics, run, start
from tests.train.test_exact_resume import assert_same_state, ids_by_step, state

SETTINGS, STEPS = ["train.epochs=4", "checkpoint.every_steps=3"], 32


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_killed_at_random_moments(tiny_config, tmp_path, kills, record_property):
    """Runs are killed and started again until they finish; a new one follows until there were `kills`. Each ends like the whole one."""
    whole, dice = tmp_path / "whole", random.Random(20261120)
    began = time.monotonic()
    run(tiny_config, whole, *SETTINGS, world=2)
    duration = time.monotonic() - began

    done, runs, repeated, moments = 0, 0, 0, []
    while done < kills:
        output, runs = tmp_path / f"run{runs}", runs + 1
        while True:
            job = start(tiny_config, output, *SETTINGS, world=2)
            if done < kills:
                moment, victims = dice.uniform(0, duration), dice.choice([[0], [1], [0, 1]])
                job.processes[0].join(moment)
                alive = [rank for rank in victims if job.processes[rank].exitcode is None]
                for rank in alive:
                    os.kill(job.processes[rank].pid, signal.SIGKILL)
                if alive:
                    done += 1
                    job.wait_for_death(alive[0])
                    moments.append(len(metrics(output, "train", missing_ok=True)))
                    continue
            assert job.wait() == [0, 0], job.text()
            break
        assert losses(output) == losses(whole)
        assert_same_state(state(output, STEPS), state(whole, STEPS))
        taken = ids_by_step(output, world=2)
        assert taken == ids_by_step(whole, world=2)
        for epoch in range(4):
            ids = [i for step in range(8 * epoch + 1, 8 * epoch + 9) for i in taken[step]]
            assert len(ids) == len(set(ids)) == 256
        scores = [{(line["step"], line["weights"]): line["top1"] for line in metrics(folder, "eval")} for folder in (output, whole)]
        assert scores[0] == scores[1]
        repeated += sum(line.get("lost_steps", 0) for line in metrics(output, "event"))
    record_property("runs", runs)
    record_property("kills", done)
    record_property("steps taken again", repeated)
    record_property("steps logged at the kills", str(moments))
    assert kills < 50 or (min(moments) == 0 and max(moments) > 24), moments
