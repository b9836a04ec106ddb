"""Training runs for tests: real processes, one per rank, over gloo.

They are forked from a server that has already imported torch and DeepSpeed, so that a start takes one second instead of
ten, and a run can be killed like any other process.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch import cli
from train.telemetry.goodput import read_lines

ROOT = Path(__file__).resolve().parents[1]

_forkserver = multiprocessing.get_context("forkserver")
# The last two are imported by DeepSpeed and torch's optimizers only when an engine is built.
_forkserver.set_forkserver_preload(
    [
        "train.trainer",
        "deepspeed",
        "torch.utils.tensorboard",
        "torch._dynamo",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)


@dataclass
class RunningJob:
    """The ranks of a started job. output: its run folder."""

    output: Path
    processes: list

    def wait(self, timeout: float = 240) -> list[int]:
        """Wait for all ranks and return their exit codes; a negative one is the signal that ended the rank."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        alive = [process for process in self.processes if process.exitcode is None]
        self.kill()
        assert not alive, f"{len(alive)} ranks still ran after {timeout} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def kill_at(self, step: int, timeout: float = 120) -> None:
        """Kill all ranks with SIGKILL as soon as metrics.jsonl contains `step`."""
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in metrics(self.output, "train", missing_ok=True)):
            assert all(process.is_alive() for process in self.processes), f"ended before step {step}:\n{self.text()}"
            assert time.monotonic() < deadline, f"step {step} did not come:\n{self.text()}"
            time.sleep(0.005)
        self.kill()

    def wait_for_death(self, rank: int, timeout: float = 120) -> int:
        """Wait for `rank` and return its exit code. If it failed, kill the others, as a launcher does."""
        self.processes[rank].join(timeout)
        code = self.processes[rank].exitcode
        assert code is not None, f"rank {rank} still ran after {timeout} s:\n{self.text()}"
        if code != 0:
            self.kill()
        else:
            self.wait()
        return code

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def text(self, rank: int = 0) -> str:
        return (self.output / f"stdout_{rank}").read_text()


def start(config: Path, output: Path, *arguments: str, world: int = 1, **options: object) -> RunningJob:
    """Start `launch/train.py --config … --output …` on `world` ranks, which print to `output/stdout_<rank>`."""
    return start_command(
        "train", output, "--config", str(config), "--output", str(output), *arguments, world=world, **options
    )


def start_command(
    name: str,
    output: Path,
    *arguments: str,
    world: int = 1,
    allow_fp16: bool = False,
    before: Callable[[int], None] | None = None,
) -> RunningJob:
    """Start `launch/<name>.py` with `arguments` on `world` ranks.

    allow_fp16: make DeepSpeed accept fp16 on the CPU, where it is slow, to test that path including loss scaling.
    before: is called with the rank in each rank's process before the command runs (tests/faults.py); it must be
    picklable.
    """
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        _forkserver.Process(target=_rank, args=(rank, world, port, [name, *arguments], str(output), allow_fp16, before))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return RunningJob(output, processes)


def run(
    config: Path, output: Path, *arguments: str, world: int = 1, timeout: float = 240, **options: object
) -> RunningJob:
    """Start a job, wait for it, and assert that all exit codes are 0."""
    job = start(config, output, *arguments, world=world, **options)
    codes = job.wait(timeout)
    assert codes == [0] * world, f"exit codes {codes}:\n{job.text()}"
    return job


def metrics(output: Path, kind: str, *, missing_ok: bool = False) -> list[dict]:
    """Lines of metrics.jsonl of one kind. Of several lines with the same step, weights and event, only the last one."""
    path = output / "metrics.jsonl"
    if missing_ok and not path.exists():
        return []
    lines = [line for line in read_lines(path) if line["kind"] == kind]
    return list({(line["step"], line.get("weights"), line.get("event")): line for line in lines}.values())


def events(output: Path, name: str) -> list[dict]:
    """All lines of one event, including repeated ones, in the order written."""
    return [line for line in read_lines(output / "metrics.jsonl") if line["kind"] == "event" and line["event"] == name]


def losses(output: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(output, "train")}


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has installed a handler for the signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _rank(
    rank: int,
    world: int,
    port: int,
    command: list[str],
    output: str,
    allow_fp16: bool,
    before: Callable[[int], None] | None,
) -> None:
    """In the forked process: set up rank `rank` as a launcher would, and run the command."""
    stream = open(Path(output) / f"stdout_{rank}", "a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if allow_fp16:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    if before:
        before(rank)
    name, *arguments = command
    sys.argv = [str(ROOT / "launch" / f"{name}.py"), *arguments]
    command = importlib.import_module(f"launch.{name}")
    cli.leave(cli.run(command.main, command.parse_arguments()))
