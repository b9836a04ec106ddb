"""The name of this machine's processor. Light: does not import torch."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Such as "AMD EPYC 7763 64-Core Processor", or the architecture ("aarch64") if the kernel gives no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
