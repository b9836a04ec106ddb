"""The process this rank is: rank and world size, device, threads, age, and the versions of what it runs."""

import ctypes
import os
import platform
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from train.engine.deepspeed_engine import destroy_process_group, init_process_group
from train.engine.network_interface import choose_interface

# Instructions that multiply bf16, as torch names them: on x86 and on ARM.
BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


PATIENCE = 1800.0  # seconds that a collective may take, by default


class Unavailable(Exception):
    """The machine has not got now what the run needs; another start may find it."""

    exit_code = 69


@dataclass(frozen=True)
class Runtime:
    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """Such as "2 × CPU (1 threads)"."""
        cuda = self.device.type == "cuda"
        return f"{self.world} × {torch.cuda.get_device_name(self.device) if cuda else f'CPU ({torch.get_num_threads()} threads)'}"

    def device_name(self) -> str:
        """Such as "NVIDIA H200", or the processor's name where the ranks have no GPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        names = (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        return next(names, platform.machine())  # ARM's kernel gives no name

    def advice(self, precision: str) -> list[str]:
        """What a person may want to change, in sentences."""
        if precision == "bf16" and self.device.type == "cpu" and not any(torch.cpu.get_capabilities().get(name) for name in BF16):
            return ["this processor has no bf16 instructions: train.precision=fp32 is faster"]
        return []


def start_runtime(patience: float = PATIENCE) -> Runtime:
    """Join the other ranks (launched by deepspeed, torchrun, or nobody: then this is the only one) and pick the device.

    patience: seconds that a collective may take. Raises Unavailable where the port at which they meet is in use.
    """
    allow_open_files()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    choose_interface()
    try:
        init_process_group(device, timedelta(seconds=patience))
    except dist.DistNetworkError as error:
        raise port_in_use(error) or error from None
    torch.set_num_threads(_cores_of_this_rank())  # on a GPU, too: with zero.offload the optimizer's step is the CPU's
    if device.type == "cpu":
        keep_memory()
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)


def port_in_use(error: dist.DistNetworkError) -> Unavailable | None:
    """The error to raise where rank 0 could not listen because the port is in use; None for other errors."""
    if "EADDRINUSE" not in str(error):
        return None
    return Unavailable(
        f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use, perhaps by another run: give deepspeed or torchrun another "
        "with --master_port; under SLURM the next start takes another by itself"
    )


def allow_open_files() -> None:
    """As many as this process may have: gloo alone takes a connection to every other rank, and shells start with 1,024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_memory() -> None:
    """Have this process keep the memory of freed tensors for the next ones.

    glibc gives large pieces back at once, and a step may have its activations' pages cleared anew: docs/performance.md has what that costs.
    Other C libraries go on as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        for parameter, value in ((trim_threshold, -1), (top_pad, 2**28), (mmap_max, 0)):
            mallopt(parameter, value)


def _cores_of_this_rank() -> int:
    """Ranks that may use the same cores share them: more threads than cores would make them wait for each other."""
    mine = socket.gethostname(), os.sched_getaffinity(0)
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    sharing = sum(host == mine[0] and bool(cores & mine[1]) for host, cores in everybody)
    return max(1, len(mine[1]) // sharing)


def stop_runtime() -> None:
    destroy_process_group()
