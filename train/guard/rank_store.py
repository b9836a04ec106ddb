"""A key-value store kept by rank 0, by which ranks communicate without collectives and GPUs, from any thread."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Bounds, in seconds, of the polling interval of `wait_for`, which is an eighth of the time waited so far.
POLL, LONGEST_POLL = 0.05, 1.0
CONNECT = timedelta(seconds=60)


class Store:
    """Strings by key, shared by all ranks. `run_id` is the same on all ranks and new at every start.

    Each thread has its own connection, opened at its first call, so that threads do not wait for each other. Rank 0
    answers from a thread of torch's that does not need the GIL. Behaviour when rank 0 fails (torch 2.15, measured with
    a stopped and with a killed process):

    - Rank 0 or its node is frozen: `get`, `wait_for`, `get_all`, `set_once` and a thread's first call block until it
      wakes up, without limit; TCPStore's timeout does not apply. `set` returns at once, and its value arrives when rank
      0 wakes up.
    - Rank 0 is dead: all methods raise ConnectionError, except that the first `set` may still appear to succeed.
    """

    def __init__(self):
        """All ranks call this; the process group must exist."""
        self._threads = threading.local()
        offer: list = [None]
        if dist.get_rank() == 0:
            self._server = _serve()
            offer = [(os.environ["MASTER_ADDR"], self._server.port, secrets.token_hex(4))]
        dist.broadcast_object_list(offer)
        self._host, self._port, self.run_id = offer[0]

    def set(self, key: str, value: str) -> None:
        """Set a value, without waiting for rank 0 to receive it."""
        with _translated():
            self._connection().set(key, value)

    def set_once(self, key: str, value: str) -> str:
        """Set the value if the key has none yet; returns the key's value, which is the first caller's."""
        with _translated():
            return self._connection().compare_set(key, "", value).decode()

    def get(self, key: str) -> str | None:
        """The value, or None if the key has none yet."""
        with _translated():
            connection = self._connection()
            return connection.get(key).decode() if connection.check([key]) else None

    def get_all(self, keys: list[str]) -> list[str | None]:
        """The values of `keys`, in two round trips if all have one."""
        with _translated():
            connection = self._connection()
            if connection.check(keys):
                return [value.decode() for value in connection.multi_get(keys)]
        return [self.get(key) for key in keys]

    def wait_for(self, key: str, seconds: float) -> str | None:
        """Poll for a value, ever more rarely. Returns None if it is not there after `seconds`, or if rank 0 is dead."""
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            try:
                value = self.get(key)
            except ConnectionError:
                return None
            if value is not None or waited >= seconds:
                return value
            time.sleep(min(max(POLL, waited / 8), LONGEST_POLL, seconds - waited))

    def delete(self, key: str) -> None:
        """Delete a key, if it exists. Without this, rank 0 keeps all values until the run's end."""
        with _translated():
            self._connection().delete_key(key)

    def sender(self) -> Callable[[str, str], None]:
        """A `set` whose connection is opened now, for a thread whose first call may come when rank 0 is frozen."""
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
    """Raise torch's connection errors as ConnectionError, for callers that do not import torch."""
    try:
        yield
    except dist.DistError as error:
        raise ConnectionError("rank 0, which keeps the store, is gone") from error
