"""The store with real processes, also while rank 0 is stopped and after it is killed."""

import os
import signal
import socket
import threading
import time
from multiprocessing import Pipe

import pytest

from tests.runs import _forkserver  # it has imported torch


def _rank(rank, world, port, pipe):
    """Execute calls of the store from the pipe: (thread, method, arguments) → (thread, result)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch.distributed as dist

    from train.guard.rank_store import Store

    dist.init_process_group("gloo")
    store, inboxes = Store(), {}
    pipe.send(store.run_id)

    def serve(name, inbox):
        while True:
            if inbox:
                method, arguments = inbox.pop(0)
                try:
                    result = getattr(store, method)(*arguments)
                except ConnectionError as error:
                    result = f"ConnectionError: {error}"
                pipe.send((name, result))
            time.sleep(0.01)

    while True:
        name, *call = pipe.recv()
        if name not in inboxes:
            inboxes[name] = []
            threading.Thread(target=serve, args=(name, inboxes[name]), daemon=True).start()
        inboxes[name].append(call)


class Rank:
    def __init__(self, rank, world, port):
        self.pipe, theirs = Pipe()
        self.process = _forkserver.Process(target=_rank, args=(rank, world, port, theirs))
        self.process.start()

    def ask(self, thread, method, *arguments):
        self.pipe.send((thread, method, arguments))

    def answer(self, timeout=60):
        assert self.pipe.poll(timeout), f"no answer in {timeout} s"
        return self.pipe.recv()

    def call(self, method, *arguments, thread="a"):
        self.ask(thread, method, *arguments)
        name, result = self.answer()
        assert name == thread
        return result

    def signal(self, number):
        os.kill(self.process.pid, number)


@pytest.fixture
def start():
    started = []

    def start(world):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started.extend(Rank(rank, world, port) for rank in range(world))
        assert len({rank.answer() for rank in started}) == 1  # run_id
        return started

    yield start
    for rank in started:
        rank.process.kill()


def test_ranks_see_what_others_set(start):
    first, second = start(2)
    assert second.call("get", "key") is None  # without waiting
    first.call("set", "key", "välue")
    assert second.call("wait_for", "key", 60) == "välue" == second.call("get", "key")
    assert second.call("get_all", ["key", "other"]) == ["välue", None]
    first.call("set", "other", "")
    second.call("wait_for", "other", 60)
    assert second.call("get_all", ["key", "other"]) == ["välue", ""]
    assert second.call("set_once", "winner", "second") == "second" == first.call("set_once", "winner", "first")
    assert second.call("wait_for", "never", 0.2) is None
    second.ask("a", "wait_for", "late", 60)
    assert second.call("get", "key", thread="b") == "välue"  # one thread waits, the other does not
    first.call("set", "late", "there")
    assert second.answer() == ("a", "there")
    second.call("delete", "key")
    second.call("delete", "never")
    assert first.call("get", "key") is None and first.call("get", "late") == "there"


def test_frozen_rank_0_holds_up_only_the_threads_that_ask(start):
    first, second = start(2)
    for thread in "ab":
        assert second.call("get", "key", thread=thread) is None  # both have their connection
    first.signal(signal.SIGSTOP)
    second.ask("a", "get", "key")
    assert not second.pipe.poll(3)
    second.call("set", "key", "said while rank 0 slept", thread="b")
    first.signal(signal.SIGCONT)
    assert second.answer()[0] == "a"
    assert second.call("wait_for", "key", 60) == "said while rank 0 slept"


def test_dead_rank_0_is_an_error(start):
    first, second = start(2)
    second.call("set", "key", "value")
    first.signal(signal.SIGKILL)
    first.process.join()
    gone = "ConnectionError: rank 0, which keeps the store, is gone"
    assert (
        second.call("get", "key") == gone == second.call("set_once", "key", "value") == second.call("get_all", ["key"])
    )
    assert second.call("wait_for", "key", 60) is None
    assert second.call("set", "key", "value") == gone == second.call("delete", "key")


def test_alone(start):
    (only,) = start(1)
    only.call("set", "key", "value")
    assert only.call("wait_for", "key", 60, thread="b") == "value"
    assert only.call("wait_for", "key", 0) == "value"  # it is there, however long a save has taken
    assert only.call("wait_for", "never", 0) is None
