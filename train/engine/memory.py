"""Memory that a rank may still allocate, and a limit that makes further allocations fail."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

# What a CPU's allocator says where there is no memory, and oneDNN, whose kernels need some of their own. Their errors
# have no type of their own.
NO_MEMORY = ("memory", "could not create a primitive")

THREADS = 2**30  # bytes of address space reserved for threads that start later: their stacks and malloc's arenas


def hosts() -> list[str]:
    """Each rank's host name; every rank calls this."""
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still allocate: on a CPU, its share of what is available on this machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    room = cgroup_room()
    free = (free if room is None else min(free, room)) // hosts().count(socket.gethostname())
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if soft == resource.RLIM_INFINITY else min(free, soft - _address_space() - THREADS)


def cgroup_room() -> int | None:
    """Bytes left by the limits of this process's control groups, SLURM's or a container's; None without a limit.

    Version 2 has one tree, version 1 one for memory alone. The limits of all parent groups apply.
    """
    rooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            if (folder / limit).exists() and (folder / usage).exists():
                text = (folder / limit).read_text().strip()
                if text != "max" and int(text) < 2**60:  # a huge number is version 1's "no limit"
                    rooms.append(int(text) - int((folder / usage).read_text()) + _reclaimable(folder))
    return min(rooms, default=None)


def _reclaimable(folder: Path) -> int:
    """Bytes of a group's usage that are cached files, which the kernel reclaims when memory is needed."""
    lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(error: Exception) -> bool:
    """Whether an error of a step under a limit of memory (`at_most`) is due to it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


@contextmanager
def at_most(more: float, device: torch.device) -> Iterator[None]:
    """Context in which allocations fail that exceed this process's present memory by more than `more` bytes.

    On a CPU this limits the address space: Linux would overcommit memory, and then kill a process.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(
            max(0.0, min(1.0, (torch.cuda.memory_reserved(device) + more) / total)), device
        )
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + max(0, int(more)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
