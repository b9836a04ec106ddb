"""Requests to stop. Imported first of all: a signal that comes while the rest is being imported must not be lost."""

import os
import signal
import threading
from collections.abc import Callable

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

    def install(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # before the handlers: what they are told would not be written otherwise
        threading.Thread(target=self._listen, args=[read], name="signals", daemon=True).start()
        for number in STOP:
            signal.signal(number, self._handle)

    def call(self, action: Callable[[], None]) -> None:
        """Call `action` when a signal comes, from another thread; at once where one has come already."""
        self._call = action
        if self.received:
            action()

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


stop_signals = StopSignals()
