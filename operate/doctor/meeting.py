"""The ranks meet at a store that rank 0 keeps, and tell each other there what they found. Nothing here waits without a limit."""

import json
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from train.engine.runtime import port_in_use

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


class NobodyThere(Exception):
    """The ranks cannot meet; the message names this rank and where it looked."""

    exit_code = 78


SILENT = 15.0  # seconds without a sign of life after which a rank is not waited for: it is dead or frozen


@dataclass(frozen=True)
class Meeting:
    """This rank among the others. hosts: by rank; of ranks that did not come, what SLURM says, or "" where nobody knows."""

    rank: int
    world: int
    store: dist.TCPStore
    hosts: tuple[str, ...]
    absent: tuple[int, ...]
    beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # rank 0: each rank's last sign of life, and when it was new

    @property
    def present(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.absent]

    @property
    def leaders(self) -> list[int]:
        """The first rank of every node that came."""
        return sorted({self.hosts[rank]: rank for rank in reversed(self.present)}.values())

    def wait_for_all(self, place: str, seconds: float) -> str | None:
        """All ranks wait for each other here, `seconds` at most. Returns None, or why they need not go on together."""
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
        """A sign of life, for those that wait for this rank."""
        self.store.set(f"beat/{self.rank}", str(time.monotonic()))

    def gather(self, value: dict, seconds: float) -> dict[int, dict]:
        """On rank 0: the values of all ranks that give one within `seconds`. Elsewhere: nothing."""
        self.store.set(f"value/{self.rank}", json.dumps(value))
        if self.rank:
            return {}
        late = self._missing("value", seconds)
        return {rank: json.loads(self.store.get(f"value/{rank}")) for rank in self.present if rank not in late}

    def give_up(self, why: str) -> None:
        """Tell all ranks that a collective cannot be waited for any longer."""
        self.store.set("given up", why)

    def given_up(self) -> str | None:
        return self.store.get("given up").decode() if self.store.check(["given up"]) else None

    def connection(self) -> dist.TCPStore:
        """A second one, for another thread: a call on a connection waits for the one before it."""
        return dist.TCPStore(self.store.host, self.store.port, is_master=False, wait_for_workers=False)

    def _missing(self, place: str, seconds: float) -> list[int]:
        """On rank 0: the ranks that have not come to `place` within `seconds`, or are silent."""
        deadline, missing, beats = time.monotonic() + seconds, self.present, self.beats
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"{place}/{rank}"])]
            now = time.monotonic()
            for rank in missing:
                beat = self.store.get(f"beat/{rank}")
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = beat, now
            if now > deadline or all(now - beats[rank][1] > SILENT for rank in missing) or (place != "value" and self.given_up()):
                break
            time.sleep(0.02)
        return missing


def meet(seconds: float, expected: list[str]) -> Meeting:
    """Find the other ranks of this launch (SLURM, deepspeed, torchrun; alone without one). Who does not come in `seconds` is `absent`.

    expected: the host of every rank, for the names of those; empty where nobody knows. Raises NobodyThere where it is rank 0 that does not,
    Unavailable where its port is in use.
    """
    if "RANK" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("beat/0", "")
        os.environ.update(ALONE, MASTER_PORT=str(store.port))
        return Meeting(0, 1, store, (socket.gethostname(),), ())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's own is at that port already
    limit = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(address, port, is_master=keeps_store, timeout=limit, wait_for_workers=False)
        store.set(f"beat/{rank}", "")
        store.set(f"here/{rank}", socket.gethostname())
        if rank == 0:
            late = _who_does_not_come(store, world, seconds)
            names = expected if len(expected) == world else [""] * world
            hosts = [names[other] if other in late else store.get(f"here/{other}").decode() for other in range(world)]
            store.set("roll", json.dumps([hosts, late]))
        store.wait(["roll"], timedelta(seconds=seconds + 30))
        hosts, late = json.loads(store.get("roll"))
    except dist.DistError as error:
        if keeps_store and (taken := port_in_use(error)):
            raise taken from error
        if keeps_store:
            raise NobodyThere(f"rank 0 on {socket.gethostname()} cannot listen at port {port}: {str(error).splitlines()[0]}") from error
        raise NobodyThere(
            f"rank {rank} on {socket.gethostname()}: no answer from rank 0 at {address} port {port} within {seconds:g} s. Does it run, do "
            "the nodes know that name, and does a firewall let them talk (--interface, MASTER_ADDR)?"
        ) from error
    return Meeting(rank, world, store, tuple(hosts), tuple(late))


def _who_does_not_come(store: dist.TCPStore, world: int, seconds: float) -> list[int]:
    deadline, late = time.monotonic() + seconds, list(range(world))
    while late and time.monotonic() < deadline:
        late = [rank for rank in late if not store.check([f"here/{rank}"])]
        time.sleep(0.02)
    return late
