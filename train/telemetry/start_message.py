"""Facts about this process for the start message: its age, the device's name, the versions of the program."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch


def start_times(previous: dict | None) -> dict[str, float | None]:
    """Seconds since this process began, and seconds between the previous start's last sign of life and that moment.

    These are the fields of a start event that goodput accounts for. `previous`: RunLock.previous; without it the fields
    that describe the previous start are None.
    """
    # Field 22 of /proc/self/stat: the process's start, in clock ticks since the machine booted.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return {
        "startup_seconds": round(age, 3),
        "down_seconds": round(time.time() - age - previous["beat"], 3) if previous else None,
        "previous_started": previous["started"] if previous else None,
    }


def device_name(device: torch.device) -> str:
    """Name of a GPU, such as "NVIDIA H200", or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """Model name of this machine's processor; its architecture if the kernel reports no name, as on ARM."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def program_versions() -> dict[str, str]:
    """Versions of Python, torch and DeepSpeed, and the git commit of this program.

    The commit ends with "-dirty" if files differ from it, and is "" outside a git checkout.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "git": commit,
    }
