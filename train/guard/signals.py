"""Stop requests by signals. Imported first, so that a signal that arrives during the other imports is not lost."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

STOP = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers in `received` the first SIGTERM, SIGUSR1, SIGINT or SIGHUP since `install`.

    A second SIGINT raises KeyboardInterrupt. SIGHUP, which a terminal sends when it is closed, stays ignored under
    nohup.

    Python runs signal handlers only between two bytecode instructions of the main thread, that is not while it waits in
    a collective. Therefore a thread reads the pipe into which Python's C handler writes the signal's number
    (`signal.set_wakeup_fd`).
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._call: Callable[[], None] | None = None
        self._interrupts = 0
        self._before: dict = {}  # the handlers replaced by `install`
        self._pipe: int | None = None

    def install(self) -> bool:
        """Handle the signals from now on; returns False if they are handled already. Call it in the main thread."""
        if self._before:
            return False
        if self._pipe is None:
            read, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            threading.Thread(target=self._listen, args=[read], name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._pipe)  # before the handlers are set, so that no signal goes unwritten
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._before = {
            number: signal.signal(number, self._handle) for number in STOP if not (nohup and number == signal.SIGHUP)
        }
        return True

    def uninstall(self) -> None:
        """Restore the handlers of before `install`, and forget a signal received."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._before, self.received, self._call, self._interrupts = {}, None, None, 0

    def follow_launcher(self) -> None:
        """If the `deepspeed` command started this rank, treat its end as SIGTERM, because it forwards no signals."""
        launcher = os.getppid()
        command = _parent(launcher)
        if (
            command
            and b"deepspeed.launcher.launch" in _command_line(launcher)
            and b"deepspeed" in _command_line(command)
        ):
            threading.Thread(target=self._follow, args=[launcher, command], name="launcher", daemon=True).start()

    def call(self, action: Callable[[], None]) -> None:
        """Call `action` from another thread when a signal arrives, or at once if one has arrived already."""
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
    """Process id of the parent; None if the process has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


stop_signals = StopSignals()
