"""What the ranks tell each other beside the collectives: a key-value store that rank 0 keeps, for threads that must not wait for a GPU."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

POLL, LONGEST_POLL = 0.05, 1.0  # seconds between two looks for a key: an eighth of the time waited so far, between these
CONNECT = timedelta(seconds=60)


class Store:
    """Strings by key, seen by all ranks. `run_id` is the same on all ranks and new at every start.

    Every thread has a connection of its own, made at its first call, so no thread waits for another one. Rank 0 answers from a thread of
    torch's that needs no GIL. What a call does when rank 0 fails (torch 2.15, measured on a stopped and on a killed process):

    - Rank 0 is frozen, or its node is: `get`, `wait_for`, `get_all`, `set_once` and the first call in a thread wait until it wakes up, for
      ever if need be; TCPStore's timeout does not apply. `set` returns at once, and what it said arrives when rank 0 wakes up.
    - Rank 0 is dead: all raise ConnectionError, but that the first `set` after its death may still seem to succeed.
    """

    def __init__(self):
        """Every rank calls this; needs the process group."""
        self._threads = threading.local()
        offer: list = [None]
        if dist.get_rank() == 0:
            self._server = _serve()
            offer = [(os.environ["MASTER_ADDR"], self._server.port, secrets.token_hex(4))]
        dist.broadcast_object_list(offer)
        self._host, self._port, self.run_id = offer[0]

    def set(self, key: str, value: str) -> None:
        """Returns before rank 0 has it."""
        with _translated():
            self._connection().set(key, value)

    def set_once(self, key: str, value: str) -> str:
        """Set what has no value yet. Returns what the key has now: of several ranks that do this at once, the first one's value."""
        with _translated():
            return self._connection().compare_set(key, "", value).decode()

    def get(self, key: str) -> str | None:
        """The value, or None where there is none yet."""
        with _translated():
            connection = self._connection()
            return connection.get(key).decode() if connection.check([key]) else None

    def get_all(self, keys: list[str]) -> list[str | None]:
        """The values of `keys`: two round trips where all have one."""
        with _translated():
            connection = self._connection()
            if connection.check(keys):
                return [value.decode() for value in connection.multi_get(keys)]
        return [self.get(key) for key in keys]

    def wait_for(self, key: str, seconds: float) -> str | None:
        """The value as soon as it is there; None after `seconds`, or where rank 0 is dead. The longer it takes, the rarer are the looks."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < seconds:
            try:
                value = self.get(key)
            except ConnectionError:
                return None
            if value is not None:
                return value
            time.sleep(min(max(POLL, waited / 8), LONGEST_POLL, seconds - waited))
        return None

    def delete(self, key: str) -> None:
        """Forget a key, whether it has a value or not: rank 0 would keep all values until the run's end."""
        with _translated():
            self._connection().delete_key(key)

    def sender(self) -> Callable[[str, str], None]:
        """A `set` with a connection made now: for a thread that may find rank 0 frozen at its first call."""
        with _translated():
            connection = self._connect()

        def send(key: str, value: str) -> None:
            with _translated():
                connection.set(key, value)

        return send

    def _connection(self) -> dist.TCPStore:
        if not hasattr(self._threads, "connection"):
            self._threads.connection = self._connect()
        return self._threads.connection

    def _connect(self) -> dist.TCPStore:
        return dist.TCPStore(self._host, self._port, is_master=False, timeout=CONNECT, wait_for_workers=False)


def _serve() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, timeout=CONNECT, wait_for_workers=False)


@contextmanager
def _translated() -> Iterator[None]:
    """Errors of the connection as what they are, for users that do not import torch."""
    try:
        yield
    except dist.DistError as error:
        raise ConnectionError("rank 0, which keeps the store, is gone") from error
