"""The ranks meet at a store that rank 0 keeps, and exchange results there. Every wait has a limit."""

import json
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from train import exit_codes
from train.engine.runtime import port_in_use

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


class MeetingFailed(Exception):
    """The ranks cannot meet; the message names this rank, and the address it tried."""

    exit_code = exit_codes.BAD_CONFIG


LOST_AFTER = 15.0  # seconds without a sign of life after which a rank counts as dead or frozen


@dataclass(frozen=True)
class Meeting:
    """This rank's view of the meeting.

    hosts: by rank; for absent ranks SLURM's name, or "" if unknown. absent: ranks that did not come. beats: on rank 0,
    each rank's last sign of life, and when it was first seen.
    """

    rank: int
    world: int
    store: dist.TCPStore
    hosts: tuple[str, ...]
    absent: tuple[int, ...]
    beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)

    @property
    def present(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.absent]

    @property
    def leaders(self) -> list[int]:
        """The first rank of every node that came."""
        return sorted({self.hosts[rank]: rank for rank in reversed(self.present)}.values())

    def wait_for_all(self, place: str, seconds: float) -> str | None:
        """Wait for all ranks, at most `seconds`. Returns None, or the reason why they cannot go on together."""
        self.store.set(f"{place}/{self.rank}", "")
        if self.rank == 0:
            late = self._missing(place, seconds)
            if late:
                self.give_up(f"{', '.join(sorted({self.hosts[rank] for rank in late}))} did not come to it")
            self.store.set(f"{place}/all", "")
        while not self.store.check([f"{place}/all"]) and not self.given_up():
            self.beat()
            time.sleep(0.05)
        return self.given_up()

    def beat(self) -> None:
        """Give a sign of life."""
        self.store.set(f"beat/{self.rank}", str(time.monotonic()))

    def gather(self, value: dict, seconds: float) -> dict[int, dict]:
        """The values of all ranks that give one within `seconds`, on rank 0; elsewhere {}."""
        self.store.set(f"value/{self.rank}", json.dumps(value))
        if self.rank:
            return {}
        late = self._missing("value", seconds)
        return {rank: json.loads(self.store.get(f"value/{rank}")) for rank in self.present if rank not in late}

    def give_up(self, reason: str) -> None:
        """Have all ranks stop waiting for a collective."""
        self.store.set("given up", reason)

    def given_up(self) -> str | None:
        """The reason that a rank gave to `give_up`, if one did."""
        return self.store.get("given up").decode() if self.store.check(["given up"]) else None

    def connection(self) -> dist.TCPStore:
        """Another connection to the store, for another thread: calls on one connection wait for each other."""
        return dist.TCPStore(self.store.host, self.store.port, is_master=False, wait_for_workers=False)

    def _missing(self, place: str, seconds: float) -> list[int]:
        """The ranks that have not come to `place` within `seconds`, or are lost; rank 0 calls this."""
        deadline, missing, beats = time.monotonic() + seconds, self.present, self.beats
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"{place}/{rank}"])]
            now = time.monotonic()
            for rank in missing:
                beat = self.store.get(f"beat/{rank}")
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = beat, now
            lost = all(now - beats[rank][1] > LOST_AFTER for rank in missing)
            if now > deadline or lost or (place != "value" and self.given_up()):
                break
            time.sleep(0.02)
        return missing


def meet(seconds: float, expected: list[str]) -> Meeting:
    """Meet the other ranks of this launch (by SLURM, deepspeed or torchrun; without one, alone).

    Ranks that do not come within `seconds` are `absent`. expected: the host of every rank, to name absent ones; empty
    if unknown. Raises MeetingFailed if rank 0 is missing, Unavailable if its port is in use.
    """
    if "RANK" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("beat/0", "")
        os.environ.update(ALONE, MASTER_PORT=str(store.port))
        return Meeting(0, 1, store, (socket.gethostname(),), ())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps a store of its own at that port.
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(address, port, is_master=keeps_store, timeout=limit, wait_for_workers=False)
        store.set(f"beat/{rank}", "")
        store.set(f"here/{rank}", socket.gethostname())
        if rank == 0:
            late = _absent_ranks(store, world, seconds)
            names = expected if len(expected) == world else [""] * world
            hosts = [names[other] if other in late else store.get(f"here/{other}").decode() for other in range(world)]
            store.set("roll", json.dumps([hosts, late]))
        store.wait(["roll"], timedelta(seconds=seconds + 30))
        hosts, late = json.loads(store.get("roll"))
    except dist.DistError as error:
        if keeps_store and (taken := port_in_use(error)):
            raise taken from error
        if keeps_store:
            raise MeetingFailed(
                f"rank 0 on {socket.gethostname()} cannot listen at port {port}: {str(error).splitlines()[0]}"
            ) from error
        raise MeetingFailed(
            f"rank {rank} on {socket.gethostname()}: no answer from rank 0 at {address} port {port} within "
            f"{seconds:g} s. Does it run, do the nodes know that name, and does a firewall let them talk (--interface, "
            "MASTER_ADDR)?"
        ) from error
    return Meeting(rank, world, store, tuple(hosts), tuple(late))


def _absent_ranks(store: dist.TCPStore, world: int, seconds: float) -> list[int]:
    deadline, late = time.monotonic() + seconds, list(range(world))
    while late and time.monotonic() < deadline:
        late = [rank for rank in late if not store.check([f"here/{rank}"])]
        time.sleep(0.02)
    return late
