"""Ranks under SLURM: their place, from SLURM's variables, and the exit codes that they leave for launch/requeue.py.

Standard library only: it runs before the command line is read.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

VERDICT_FILE = "CAT_VERDICT_FILE"  # environment variable: prefix of the files by which ranks report their exit codes
NODES_TIMEOUT = 15.0  # seconds that a rank waits for the other nodes' exit codes: they may have started later


def adopt_slurm_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a task of an srun step.

    Change nothing if the step has one task, under a launcher that has set RANK (deepspeed, torchrun), in a batch
    script, and in the shell of `salloc` or `srun --pty`. A MASTER_ADDR or MASTER_PORT that is set already is kept.
    """
    ranks = slurm_ranks(os.environ)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in os.environ:
            ranks.pop(name, None)
    os.environ.update(ranks)


def slurm_ranks(environment: dict[str, str]) -> dict[str, str]:
    """The variables that torch.distributed needs in this task; empty if it is not one of several tasks."""
    step = environment.get("SLURM_STEP_ID", "")
    # Step ids from 0xfffffff0 on are SLURM's own, such as the batch script and the shell of salloc.
    if "RANK" in environment or not step.isdecimal() or int(step) >= 0xFFFFFFF0:
        return {}
    # With srun --pty, only task 0 has the terminal.
    world = int(environment["SLURM_STEP_NUM_TASKS"])
    if world == 1 or "SLURM_PTY_PORT" in environment:
        return {}
    # With srun --gpus-per-task=1 each task sees its own GPU only.
    one_gpu = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0" if one_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
        ),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(
            master_port(int(environment["SLURM_JOB_ID"]), int(step), int(environment.get("SLURM_RESTART_COUNT", 0)))
        ),
    }


def first_host(nodes: str) -> str:
    """The first of a list of hosts in SLURM's short form: "gpu[07-09,12],cpu1" → "gpu07"."""
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host)


def tasks_per_node(short: str) -> list[int]:
    """SLURM's short form of a list of numbers: "2(x3),1" → [2, 2, 2, 1]."""
    numbers = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", short):
        numbers += [int(tasks)] * int(repeats or 1)
    return numbers


def master_port(job: int, step: int, restart: int) -> int:
    """A port in 10000 … 29998, below the ephemeral ports: the same for all ranks of a step.

    Jobs whose ids differ by less than 10,000 have different ports, and the next port is left free. A start whose port
    is taken fails, and the next start uses another.
    """
    return 10000 + 2 * ((job * 7919 + step * 101 + restart) % 10000)


def report_verdict(code: int, *, everywhere: bool = False) -> None:
    """Report this node's exit code to launch/requeue.py, in a job that launch/submit.py made; elsewhere do nothing.

    everywhere: the code holds for every node. srun's own exit code is not enough: the first rank that fails ends the
    step, and the ranks that srun then ends have the highest code; if srun could not start the ranks, its code may be 0.
    """
    path = os.environ.get(VERDICT_FILE)
    if not path or (code == 0 and os.environ.get("RANK", "0") != "0"):
        return
    nodes = range(int(os.environ["SLURM_STEP_NUM_NODES"])) if everywhere else [os.environ["SLURM_NODEID"]]
    with contextlib.suppress(OSError):  # a full disk
        for node in nodes:
            Path(f"{path}.{code}.{node}").touch()


def verdicts(path: str) -> dict[int, set[int]]:
    """The reports beside `path`: exit code -> nodes of which a rank has ended with it."""
    found: dict[int, set[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(os.path.dirname(path)):
            if match := re.fullmatch(re.escape(os.path.basename(path)) + r"\.(\d+)\.(\d+)", name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found


def wait_for_verdicts(cancelled: Callable[[], bool]) -> None:
    """Wait until every node has reported, at most NODES_TIMEOUT: srun ends all ranks as soon as one has failed."""
    path, deadline = os.environ.get(VERDICT_FILE), time.monotonic() + NODES_TIMEOUT
    while path and time.monotonic() < deadline and not cancelled():
        if len(set().union(*verdicts(path).values())) >= int(os.environ["SLURM_STEP_NUM_NODES"]):
            return
        time.sleep(0.2)
