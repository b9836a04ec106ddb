"""Requests to stop. Imported first of all: a signal that comes while the rest is being imported must not be lost."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers the first SIGTERM, SIGUSR1 or SIGINT since `install`; a second SIGINT interrupts at once, as it always does.

    Python runs a handler only between two of the main thread's instructions, which do not come while a collective waits. So a thread
    listens to the pipe into which Python's C handler writes the signal's number.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._call: Callable[[], None] | None = None
        self._interrupts = 0
        self._installed = False

    def install(self) -> None:
        """Handle the signals from now on; again is no mistake."""
        if self._installed:
            return
        self._installed = True
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # before the handlers: what they are told would not be written otherwise
        threading.Thread(target=self._listen, args=[read], name="signals", daemon=True).start()
        for number in STOP:
            signal.signal(number, self._handle)

    def follow_launcher(self) -> None:
        """Where the `deepspeed` command has started this rank: its end is a request to stop, too, as it hands no signal on."""
        launcher = os.getppid()
        command = _parent(launcher)
        if command and b"deepspeed.launcher.launch" in _command_line(launcher) and b"deepspeed" in _command_line(command):
            threading.Thread(target=self._follow, args=[launcher, command], name="launcher", daemon=True).start()

    def call(self, action: Callable[[], None]) -> None:
        """Call `action` when a signal comes, from another thread; at once where one has come already."""
        self._call = action
        if self.received:
            action()

    def _follow(self, launcher: int, command: int) -> None:
        while _parent(launcher) == command:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: object) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _listen(self, pipe: int) -> None:
        while True:
            number = os.read(pipe, 1)[0]
            if number in STOP and not self.received:
                self.received = signal.Signals(number)
                if self._call:
                    self._call()


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


stop_signals = StopSignals()
