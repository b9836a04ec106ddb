"""Three hundred epochs, each with an evaluation and a checkpoint, do not accumulate memory, files or threads."""

import os
import time
from dataclasses import dataclass

import pytest

from tests.runs import RunningJob, metrics, start

EPOCHS, STEPS = 300, 8


@dataclass
class Held:
    """What a process holds after a step."""

    step: int
    megabytes: float  # of memory of its own, not of files
    files: int
    threads: int


def held(job: RunningJob, step: int) -> Held | None:
    """What rank 0 holds; None if it has just ended."""
    pid = job.processes[0].pid
    try:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        megabytes = int(status["RssAnon"].split()[0]) / 1000
        return Held(step, megabytes, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_memory_files_and_threads_do_not_grow(tiny_config, tmp_path, record_property):
    settings = [f"train.epochs={EPOCHS}", "checkpoint.every_epochs=1", "monitor.images=4", f"train.log_every={STEPS}"]
    job, seen = start(tiny_config, tmp_path, *settings, world=2), []
    while job.processes[0].exitcode is None:
        lines = metrics(tmp_path, "train", missing_ok=True)
        new = lines and (not seen or lines[-1]["step"] > seen[-1].step)
        if new and (found := held(job, lines[-1]["step"])):
            seen.append(found)
        time.sleep(0.5)
    assert job.wait() == [0, 0], job.text()
    warm = [each for each in seen if EPOCHS // 6 < each.step // STEPS <= EPOCHS // 3]
    late = [each for each in seen if each.step // STEPS > EPOCHS - EPOCHS // 6]
    grown = max(each.megabytes for each in late) - max(each.megabytes for each in warm)
    record_property("megabytes, from 100 to 300 epochs", round(grown, 1))
    assert grown < 15, [(each.step, each.megabytes) for each in seen]
    for name in ("files", "threads"):
        most = [max(getattr(each, name) for each in part) for part in (warm, late)]
        assert most[1] <= most[0] + 2, (name, most)
