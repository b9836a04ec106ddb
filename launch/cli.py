"""What the commands share: exit codes, and how an error is said."""

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from launch.ranks import FINAL, report_verdict, wait_for_verdicts
from train.guard.signals import stop_signals

EXIT_CRASHED, EXIT_DATA, EXIT_UNAVAILABLE, EXIT_FAILED, EXIT_IO, EXIT_STOPPED, EXIT_CONFIG = 1, 65, 69, 70, 74, 75, 78
ALL_SAY_SO = (EXIT_FAILED, EXIT_STOPPED)  # agreed upon by the ranks: one says it
TURN = 2.0  # seconds in which a launcher ends the ranks that have nothing else to say than rank 0
# What the system says of a file that may be read or written later.
PASSING = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS}


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code and form for bad arguments."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(EXIT_CONFIG, f"{message} (see --help)"))


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """The command's exit code: 0, or that of an error the user can mend, said in one sentence. Other errors have their traceback."""
    try:
        command(arguments)
    except Exception as error:
        if hasattr(error, "exit_code"):
            return fail(error.exit_code, error, everywhere=getattr(error, "everywhere", False))
        sys.excepthook(type(error), error, error.__traceback__)  # torch's own names the rank in every line
        return fail(*_shortage(error))
    report_verdict(0)
    return 0


def leave(code: int) -> NoReturn:
    """End a process that was a rank, at once.

    While Python shuts down, a thread of gloo that still has a tensor to drop would abort it, and after an error of a GPU it may hang.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a file on a full disk
            stream.flush()
    os._exit(code)


def fail(code: int, error: Exception | str | None, *, everywhere: bool = False) -> int:
    """One sentence on stderr, of every rank that has one of its own; `everywhere`: it holds for all nodes. Returns `code`.

    The first rank to leave ends the job. So a rank that may have nothing to add to rank 0's words leaves later, and all stay until the
    other nodes have left theirs for launch/requeue.py.
    """
    report_verdict(code, everywhere=everywhere)
    before = stop_signals.received
    rank, prefix = os.environ.get("RANK", "0"), "" if code == EXIT_STOPPED else "error: "

    def ended() -> bool:
        """A launcher asks this rank to end, as another one has failed."""
        return stop_signals.received != before

    if rank != "0":
        prefix += f"rank {rank}: "
        if code in (*ALL_SAY_SO, EXIT_CONFIG):
            deadline = time.monotonic() + TURN
            while time.monotonic() < deadline and not ended():
                time.sleep(0.05)
            error = None if code in ALL_SAY_SO or ended() else error
    if error is not None:
        with contextlib.suppress(OSError):
            print(f"{prefix}{error}", file=sys.stderr, flush=True)
    if code in FINAL:
        wait_for_verdicts(ended)
    return code


def _shortage(error: Exception) -> tuple[int, str | None]:
    """Exit code and sentence for an error that says nothing of its own, but that the machine lacks something now; else those of a crash."""
    text = str(error)
    # Of torch only the names are known here: it may not have been imported. A CPU's allocator has no error type of its own.
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text))
    ):
        return EXIT_UNAVAILABLE, (
            "out of memory: see who else uses it (nvidia-smi, free -h). For a GPU's: lower train.micro_batch, set "
            "train.activation_checkpointing=true, raise zero.stage. For the host's: lower data.workers or data.prefetch, or ask SLURM "
            "for more with --mem"
        )
    if isinstance(error, OSError) and error.errno in PASSING:
        return EXIT_IO, f"{error.filename or 'a file (see above)'}: {error.strerror}; mend that, and start again"
    return EXIT_CRASHED, None
