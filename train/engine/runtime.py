"""This process as a rank: its rank, world size and device, and the set-up of process group, threads and memory."""

import ctypes
import os
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from train import exit_codes
from train.engine.deepspeed_start import destroy_process_group, init_process_group
from train.engine.network_interface import choose_interface
from train.engine.processor import processor_name

# CPU capabilities with bf16 arithmetic, by torch's names: x86, then ARM.
BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

PATIENCE = 1800.0  # default timeout of a collective, in seconds


class Unavailable(Exception):
    """A resource of the machine is not available now; a later start may succeed."""

    exit_code = exit_codes.UNAVAILABLE


@dataclass(frozen=True)
class Runtime:
    """This process's rank and device. `local_rank` is the rank on its node."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """The ranks' devices, such as "2 × CPU (1 threads)"."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"CPU ({torch.get_num_threads()} threads)"
        return f"{self.world} × {name}"

    def device_name(self) -> str:
        """The device's name, such as "NVIDIA H200"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor_name()

    def advice(self, precision: str) -> list[str]:
        """Recommendations for the log, in sentences."""
        if (
            precision == "bf16"
            and self.device.type == "cpu"
            and not any(torch.cpu.get_capabilities().get(name) for name in BF16)
        ):
            return ["this processor has no bf16 instructions: train.precision=fp32 is faster"]
        return []


def start_runtime(patience: float = PATIENCE) -> Runtime:
    """Join the process group and choose the device.

    Ranks are started by deepspeed, torchrun or srun; without a launcher this process is the only rank. patience:
    timeout of a collective in seconds. Raises Unavailable if MASTER_PORT is in use, or SLURM's GPUs cannot be used.
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
        # CUDA graphs cannot be recorded on the default stream, and a parameter's node in the graph of autograd, which
        # DeepSpeed may keep, belongs to the stream on which it was made: everything runs on one other stream.
        torch.cuda.set_stream(torch.cuda.Stream(device))
        # Some of cuDNN's convolutions sum gradients in an order that varies; what they cost has not been measured.
        torch.backends.cudnn.deterministic = True
    elif int(os.environ.get("SLURM_GPUS_ON_NODE", 0)) and os.environ.get("DS_ACCELERATOR") != "cpu":
        node = socket.gethostname()
        raise Unavailable(
            f"SLURM gave this job GPUs of {node}, and PyTorch cannot use them: see nvidia-smi and python -m "
            f"torch.utils.collect_env there, or leave the node out with --sbatch=--exclude={node}. To train on CPUs, "
            "set DS_ACCELERATOR=cpu"
        )
    else:
        device = torch.device("cpu")
    choose_interface()
    try:
        init_process_group(device, timedelta(seconds=patience))
    except dist.DistNetworkError as error:
        raise port_in_use(error) or error from None
    torch.set_num_threads(_cores_of_this_rank())  # on GPUs, too: with zero.offload the optimizer runs on the CPU
    if device.type == "cpu":
        keep_memory()
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)


def port_in_use(error: dist.DistNetworkError) -> Unavailable | None:
    """The error to raise if rank 0 could not listen because the port is in use; None for other errors."""
    if "EADDRINUSE" not in str(error):
        return None
    return Unavailable(
        f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use, perhaps by another run: give deepspeed "
        "or torchrun another with --master_port; under SLURM the next start takes another by itself"
    )


def allow_open_files() -> None:
    """Raise the limit of open files to the hard limit.

    Shells often start with 1,024, and gloo alone opens a connection to every other rank.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_memory() -> None:
    """Keep the memory of freed tensors in this process for the next ones.

    glibc returns large blocks to the system at once, so that every step would have the pages of its activations cleared
    anew; docs/performance.md has the cost. No effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        for parameter, value in ((trim_threshold, -1), (top_pad, 2**28), (mmap_max, 0)):
            mallopt(parameter, value)


def _cores_of_this_rank() -> int:
    """This rank's part of the cores that it may use; ranks that may use the same cores share them.

    More threads than cores would wait for each other.
    """
    mine = socket.gethostname(), os.sched_getaffinity(0)
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    sharing = sum(host == mine[0] and bool(cores & mine[1]) for host, cores in ranks)
    return max(1, len(mine[1]) // sharing)


def leave_after(error: BaseException) -> None:
    """Leave the process group after an error if there are no other ranks, so that this process can start a next run.

    After an error of its GPU it cannot, and leaving may hang.
    """
    if dist.is_initialized() and dist.get_world_size() == 1 and not isinstance(error, torch.AcceleratorError):
        stop_runtime()


def stop_runtime() -> None:
    """Leave the process group."""
    destroy_process_group()
