"""Runs several programs, each on one core of its own, as many at a time as there are cores."""

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]


def run_on_cores(commands: Iterable[Sequence[str]]) -> None:
    """Run all `commands` to their ends, in the repository's root. Raises SystemExit if one fails."""
    cores: SimpleQueue[int] = SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def run(command: Sequence[str]) -> None:
        core = cores.get()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(["taskset", "-c", str(core), *command], cwd=ROOT, env=environment)
        cores.put(core)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")

    with ThreadPoolExecutor(cores.qsize()) as executor:
        list(executor.map(run, commands))
