"""The process this rank is: rank and world size, device, threads."""

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.engine import init_process_group


@dataclass(frozen=True)
class Runtime:
    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_runtime() -> Runtime:
    """Join the other ranks (launched by deepspeed, torchrun, or nobody: then this is the only one) and pick the device."""
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
        # Ranks on one machine share its cores: more threads than cores would make them wait for each other.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    init_process_group(device)
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)


def stop_runtime() -> None:
    dist.destroy_process_group()
