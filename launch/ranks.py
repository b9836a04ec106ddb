"""A rank's place among the others, from SLURM's variables, and the exit code that it ends with.

Standard library only: it runs before the command line is read.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

VERDICT_FILE = "CAT_VERDICT_FILE"  # environment variable: beside this path the ranks leave the exit codes that they end with
PATIENCE = 15.0  # seconds that a rank waits for the other nodes' words: they may have started later


class Failure(NamedTuple):
    """A row of the table in docs/failures.md: what ends a run, who says so, with which exit codes, and whether it is started again."""

    what: str
    who: str
    codes: tuple[int, ...]  # empty: any other
    again: bool


FAILURES = (
    Failure("finished", "rank 0", (0,), False),
    Failure("bad data: samples that cannot be read, a dataset that is not whole", "every node", (65,), False),
    Failure("a port is in use", "rank 0", (69,), True),
    Failure("out of memory", "any rank", (69,), True),
    Failure("training failed: gradients that are not finite", "every node", (70,), False),
    Failure("a rank hangs, or ranks do not find each other", "any rank", (71,), True),
    Failure("files cannot be read or written: an I/O error, a full disk, the last checkpoint", "any rank", (74,), True),
    Failure("stopped on request, or not in time", "any rank", (75,), True),
    Failure("bad configuration: a config that is refused, settings changed, the folder is in use", "every node", (78,), False),
    Failure("one node differs", "some nodes", (65, 70, 78), True),
    Failure("a rank crashes, or NCCL or gloo have lost a neighbour", "any rank", (1,), True),
    Failure("a rank is killed", "any rank", (), True),
)
# Exit codes after which another start would end the same way, where a rank of every node has said so.
FINAL = {code: failure.what.partition(":")[0] for failure in FAILURES if not failure.again for code in failure.codes}


def adopt_slurm_ranks() -> None:
    """In a task of an srun step of several: set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Anywhere else nothing is changed: under a launcher that has set RANK (deepspeed, torchrun), in a batch script, in the shell of
    `salloc` or `srun --pty`, in a step of one task. A MASTER_ADDR or MASTER_PORT that is set already stays.
    """
    ranks = slurm_ranks(os.environ)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in os.environ:
            ranks.pop(name, None)
    os.environ.update(ranks)


def slurm_ranks(environment: dict[str, str]) -> dict[str, str]:
    """The variables that torch.distributed wants, for this task; empty where it is none of several."""
    step = environment.get("SLURM_STEP_ID", "")
    # From 0xfffffff0 on: SLURM's own steps, such as the batch script and the shell of salloc.
    if "RANK" in environment or not step.isdecimal() or int(step) >= 0xFFFFFFF0:
        return {}
    # In a shell that srun gave a terminal (--pty), task 0 alone is there to type.
    world = int(environment["SLURM_STEP_NUM_TASKS"])
    if world == 1 or "SLURM_PTY_PORT" in environment:
        return {}
    one_gpu = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))  # srun --gpus-per-task=1: each task sees its own only
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0" if one_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(master_port(int(environment["SLURM_JOB_ID"]), int(step), int(environment.get("SLURM_RESTART_COUNT", 0)))),
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
    """A port in 10000 … 29998, below those that systems hand out: the same for all ranks of a step.

    Two jobs of which the second was submitted within 10,000 of the first have different ones; the port next to it stays free, too.
    A start that finds its port taken fails, and the next start has another.
    """
    return 10000 + 2 * ((job * 7919 + step * 101 + restart) % 10000)


def report_verdict(code: int, *, everywhere: bool = False) -> None:
    """Leave this node's word where launch/requeue.py reads it, if a job that launch/submit.py made is waiting for it.

    everywhere: what is said holds for every node. srun's own exit code does not tell: the first rank that fails ends the step, and ranks
    that are ended so have the highest code; and where it could not start the ranks, it may be 0.
    """
    path = os.environ.get(VERDICT_FILE)
    if not path or (code == 0 and os.environ.get("RANK", "0") != "0"):
        return
    nodes = range(int(os.environ["SLURM_STEP_NUM_NODES"])) if everywhere else [os.environ["SLURM_NODEID"]]
    with contextlib.suppress(OSError):  # a full disk
        for node in nodes:
            Path(f"{path}.{code}.{node}").touch()


def verdicts(path: str) -> dict[int, set[int]]:
    """The words beside `path`: by exit code, the nodes of which a rank has ended with it."""
    found: dict[int, set[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(os.path.dirname(path)):
            if match := re.fullmatch(re.escape(os.path.basename(path)) + r"\.(\d+)\.(\d+)", name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
    return found


def wait_for_verdicts(given_up: Callable[[], bool]) -> None:
    """Return when a rank of every node has left its word, or after PATIENCE: srun ends all ranks as soon as one has failed."""
    path, deadline = os.environ.get(VERDICT_FILE), time.monotonic() + PATIENCE
    while path and time.monotonic() < deadline and not given_up():
        if len(set().union(*verdicts(path).values())) >= int(os.environ["SLURM_STEP_NUM_NODES"]):
            return
        time.sleep(0.2)
