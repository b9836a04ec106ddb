"""A rank's place among the others, from SLURM's variables. Standard library only: it runs before the command line is read."""

import contextlib
import os
import re

VERDICT_FILE = "CAT_VERDICT_FILE"  # environment variable: where a rank leaves the exit code that the run ends with
# Exit codes of launch/train.py after which another start would end the same way.
FINAL = {0: "finished", 65: "bad data", 70: "training failed", 78: "bad configuration"}


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


def report_verdict(code: int) -> None:
    """Leave a final exit code where launch/requeue.py reads it, if a job that launch/submit.py made is waiting for it.

    srun's own does not tell: the first rank that fails ends the step, and ranks that are ended so have the highest code; and where it
    could not start the ranks, it may be 0.
    """
    path, rank = os.environ.get(VERDICT_FILE), os.environ.get("RANK", "0")
    if path and code in FINAL and (code or rank == "0"):
        with contextlib.suppress(OSError):  # a full disk
            with open(f"{path}.{rank}", "w") as file:
                file.write(str(code))
            os.replace(f"{path}.{rank}", path)
