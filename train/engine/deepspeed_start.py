"""Import of DeepSpeed, and the process group that it and torch.distributed share."""

import logging
import os
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist

from train.engine import deepspeed_internals as internals


def import_deepspeed() -> ModuleType:
    """The package, without its messages and without extensions that would be compiled at start-up."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    internals.skip_shared_memory_extension()
    return deepspeed


def init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL on GPUs, gloo on CPUs.

    timeout: of a collective, in this group and in all groups made later.
    """
    deepspeed = import_deepspeed()
    # DeepSpeed creates groups of its own without a timeout, so change torch's default.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":  # DeepSpeed would not name the device, and torch would warn at barriers
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def destroy_process_group() -> None:
    """Leave the process group. DeepSpeed must do it, or it would use the old groups in this process's next run."""
    import_deepspeed().comm.destroy_process_group()
