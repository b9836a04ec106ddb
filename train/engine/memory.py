"""What memory a rank may still take, of a machine, a control group and a process; and how to be refused more instead of killed."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

THREADS = 2**30  # bytes of address space, used or not, that the threads take which are started later: their stacks and malloc's arenas


def hosts() -> list[str]:
    """The name of each rank's machine; every rank calls this."""
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take: on a CPU its part of what is available to all ranks on this machine."""
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
    """Bytes that the control groups of this process, SLURM's or a container's, leave it; None without a limit.

    Version 2 has one tree, version 1 one of memory's own; a group is bounded by all groups above it.
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
                if text != "max" and int(text) < 2**60:  # version 1 says "no limit" by a huge number
                    rooms.append(int(text) - int((folder / usage).read_text()) + _reclaimable(folder))
    return min(rooms, default=None)


def _reclaimable(folder: Path) -> int:
    """Bytes of a group's usage that are files' pages: the kernel takes them back where memory is wanted."""
    lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def at_most(more: float, device: torch.device) -> Iterator[None]:
    """Inside, an allocation fails that would take this process more than `more` bytes above what it has now.

    On a CPU that is a limit of its address space: without one the system would give out memory that it has not got, and kill a process.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (torch.cuda.memory_reserved(device) + more) / total)), device)
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
