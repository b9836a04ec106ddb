"""What a start of a run says of itself: where it begins, on what machine, with which versions, and how old its process
is.
"""

import os
import platform
import socket
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train.telemetry.metrics import Metric, describe_metrics
from train.telemetry.monitor import Monitor


def announce_start(
    monitor: Monitor,
    metrics: tuple[Metric, ...],
    checkpoint: Path | None,
    step: int,
    last: int,
    lost: int,
    where: str,
    fields: dict[str, Any],
) -> None:
    """Write the `start` or `resume` event of metrics.jsonl, and its sentence for people.

    checkpoint: the one that the run goes on from, of `step`. last: the run's last step. lost: steps that are taken
    again. where: the ranks and their devices, in words. fields: further fields of the event.
    """
    again = f" ({lost} steps are taken again)" if lost else ""
    config, tensorboard = monitor.config, monitor.output / "tensorboard"
    what = f"resumed from {checkpoint}" if checkpoint else f"training {config.model.name} on {config.data.path}"
    text = f"{what}: step {step} of {last}{again}, {where}, TensorBoard: tensorboard --logdir {tensorboard}"
    fields = {
        **fields,
        "lost_steps": lost,
        "last": last,
        "host": socket.gethostname(),
        "metrics": describe_metrics(metrics),
    }
    fields["samples"] = monitor.samples
    monitor.event("resume" if checkpoint else "start", step, text, **fields)


def start_times(previous: dict | None) -> dict[str, float | None]:
    """For goodput: seconds since this process began, and from the last sign of life of the start before it (None:
    unknown) to then.

    previous: that start's record in the run's lock.
    """
    # Linux counts clock ticks from the machine's start to the process's.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return {
        "startup_seconds": round(age, 3),
        "down_seconds": round(time.time() - age - previous["beat"], 3) if previous else None,
        "previous_started": previous["started"] if previous else None,
    }


def program_versions() -> dict[str, str]:
    """Versions of python, torch and deepspeed, and the git commit of this program ("-dirty" if files differ, "" without
    a checkout).
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "git": commit,
    }
