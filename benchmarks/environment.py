"""Where a benchmark ran: the machine and the versions of the programs."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from train.engine.processor import processor_name


def machine() -> str:
    """The GPU, if torch is imported and sees one, and the CPU with its usable cores."""
    cores = f"{processor_name()}, {len(os.sched_getaffinity(0))} cores"
    torch = sys.modules.get("torch")
    return f"{torch.cuda.get_device_name()}, {cores}" if torch and torch.cuda.is_available() else cores


def versions() -> dict[str, str]:
    """Versions of Python, torch and Triton."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Triton is not available on every platform
            found[name] = "not installed"
    return found
