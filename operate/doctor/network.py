"""Measure the ranks' clocks and the network between them."""

import os
import socket
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from train.engine.flops import finish
from train.guard.rank_store import Store

LONG_ENOUGH = 0.03  # seconds of one transfer; a larger one would not be measured better
SMALLEST, LARGEST = 2**20, 2**28  # bytes
REPEATS = 3  # the fastest counts, as disturbances only slow a transfer down
ROUNDS = 31  # of pairs: all pairs of up to 32 nodes; with more nodes, 31 partners for each


def gloo(seconds: float) -> None:
    """Use what a run needs beside NCCL: gloo, and rank 0's store. Raises RuntimeError if one fails."""
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        about = f"gloo on {socket.gethostname()}, interface {os.environ.get('GLOO_SOCKET_IFNAME', 'of its choice')}"
        raise RuntimeError(f"{about}: {str(error).splitlines()[0]}") from error
    store = Store()
    store.set(f"doctor/{dist.get_rank()}", "here")
    for rank in range(dist.get_world_size()):
        if store.wait_for(f"doctor/{rank}", seconds) is None:
            raise RuntimeError(f"the store that rank 0 keeps has no word of rank {rank} after {seconds:g} s")
    dist.barrier(group=group)  # rank 0's store ends with this function


def clocks() -> list[float]:
    """Unix times at five moments that are the same on all ranks, as nearly as a barrier ends everywhere at once."""
    stamps = []
    for _ in range(5):
        dist.barrier()
        stamps.append(time.time())
    return stamps


def all_reduce(device: torch.device) -> dict[str, float]:
    """Latency (s) of one number; bytes and seconds of the largest all-reduce tried, fp32. The same on all ranks."""
    one = torch.zeros(1, device=device)
    latencies = []
    for _ in range(20):
        latencies.append(_seconds(lambda: dist.all_reduce(one), device))
    size = SMALLEST
    while True:
        data = torch.zeros(size // 4, device=device)
        best = min(_seconds(lambda data=data: dist.all_reduce(data), device) for _ in range(REPEATS))
        slowest = torch.tensor(best, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if slowest > LONG_ENOUGH or size == LARGEST:
            return {"latency": statistics.median(latencies), "bytes": size, "seconds": slowest.item()}
        size *= 4


def pairs(leaders: list[int], rank: int, device: torch.device) -> list[dict]:
    """Measure the links from this rank to the other leaders: {"to": rank, "bytes_per_second", "latency"} for each.

    leaders: the first rank of every node. All pairs of a round communicate at the same time, as they do in training.
    """
    found = []
    for a, b in [pair for pair in schedule(leaders) if rank in pair]:
        for source, target in ((a, b), (b, a)):
            if rank == source:
                found.append({"to": target, **_send(target, device)})
            else:
                _receive(source, device)
    return found


def schedule(leaders: list[int]) -> list[tuple[int, int]]:
    """All pairs, round after round, no rank twice in a round: the circle method of round-robin tournaments."""
    ring = list(leaders) + [None] * (len(leaders) % 2)
    found = []
    for _ in range(min(ROUNDS, len(ring) - 1)):
        half = len(ring) // 2
        found += [
            (a, b) for a, b in zip(ring[:half], reversed(ring[half:]), strict=True) if a is not None and b is not None
        ]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def _send(target: int, device: torch.device) -> dict[str, float]:
    word = torch.zeros(1, dtype=torch.float64, device=device)  # bytes of the next transfer; 0: end

    def transfer(data: torch.Tensor) -> None:
        dist.send(data, target)
        dist.recv(word, target)

    trips = [_seconds(lambda: transfer(word), device) for _ in range(10)]  # the first one may connect
    size, rates = SMALLEST, []
    while size:
        dist.send(word.fill_(size), target)
        data = torch.zeros(size, dtype=torch.uint8, device=device)
        seconds = min(_seconds(lambda data=data: transfer(data), device) for _ in range(REPEATS))
        rates.append(size / seconds)
        size = 0 if seconds > LONG_ENOUGH or size == LARGEST else 4 * size
    dist.send(word.zero_(), target)
    return {"latency": statistics.median(trips) / 2, "bytes_per_second": max(rates)}


def _receive(source: int, device: torch.device) -> None:
    word = torch.zeros(1, dtype=torch.float64, device=device)
    for _ in range(10):
        dist.recv(word, source)
        dist.send(word, source)
    while True:
        dist.recv(word, source)
        size = int(word.item())
        if not size:
            return
        data = torch.empty(size, dtype=torch.uint8, device=device)
        for _ in range(REPEATS):
            dist.recv(data, source)
            dist.send(word, source)


def _seconds(action, device: torch.device) -> float:
    finish(device)
    began = time.perf_counter()
    action()
    finish(device)
    return time.perf_counter() - began
