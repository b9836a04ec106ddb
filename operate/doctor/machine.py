"""A node's devices, software versions and limits."""

import os
import re
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from train.engine.processor import processor_name
from train.telemetry.start_message import program_versions

# The libraries that compute, decode or store something: those of pyproject.toml, and their dependencies for GPUs.
PACKAGES = (
    *("torchvision", "timm", "triton", "webdataset", "einops", "numpy", "fsspec", "pillow", "simplejpeg"),
    *("pydantic", "safetensors", "nvidia-dali-cuda130", "ffcv"),
)


def devices(local_rank: int) -> dict:
    """The device of this rank, and the cores it may use."""
    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return {"kind": "cpu", "name": processor_name(), "cores": cores}
    about = torch.cuda.get_device_properties(local_rank)
    return {
        "kind": "gpu",
        "name": about.name,
        "bytes": about.total_memory,
        "visible": torch.cuda.device_count(),
        "cores": cores,
    }


def versions() -> dict[str, str]:
    """Versions of everything that must be the same on all nodes; "none" if it is not installed."""
    found = program_versions()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    found["NVIDIA driver"] = re.search(r"Module.*?\s(\d[\d.]+)", driver.read_text())[1] if driver.exists() else "none"
    return found


def limits() -> dict:
    """Limits of open files (soft and hard, -1: no limit), and bytes free in /dev/shm (None without one)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {"open_files": soft, "open_files_hard": hard, "shm_bytes": shm and shm.f_bavail * shm.f_frsize}
