"""Argument parsing, exit codes and error messages shared by the commands."""

import argparse
import atexit
import contextlib
import errno
import math
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from launch.ranks import report_verdict, wait_for_verdicts
from train import exit_codes
from train.exit_codes import FINAL, exit_code_of
from train.guard.signals import stop_signals

SAME_ON_ALL_RANKS = (exit_codes.FAILED, exit_codes.STOPPED)  # the ranks agreed on it, so rank 0 alone prints it
OFTEN_THE_SAME = (exit_codes.BAD_CONFIG, exit_codes.BAD_DATA)  # or one rank's alone, such as a folder of its node
YIELD_SECONDS = 2.0  # within this time the launcher ends ranks whose error is the same as rank 0's
sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: the name of a file need not be UTF-8
TRANSIENT_ERRNOS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS}  # the file may work later


class Parser(argparse.ArgumentParser):
    """argparse, with this project's exit code and message format for bad arguments."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(exit_codes.BAD_CONFIG, f"{message} (see --help)"))


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type of argparse: a number from `least` to `most`."""
    name = "whole number" if kind is int else "number"
    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {bounds}")
        return value

    return parse


def add_overrides(
    parser: argparse.ArgumentParser, text: str = "settings that replace the recipe's, e.g. train.max_steps=10"
) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Add --local_rank, which the deepspeed launcher passes, unused: the environment says the same."""
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def add_choice_of_weights(parser: argparse.ArgumentParser) -> None:
    """Add --best and --weights, which choose among a run's checkpoints and their weights."""
    parser.add_argument(
        "--best",
        action="store_true",
        help="of a run: use the checkpoint whose EMA has the best score in the run's evaluations",
    )
    parser.add_argument(
        "--weights", choices=["ema", "model"], help="which weights (default: ema if the run has an EMA)"
    )


def check_output(option: str, path: str | Path, *, parents: bool = False) -> None:
    """Raise ConfigError, before any work, if nothing can be written to `path`, which `option` has named.

    A path that ends in "/" is a folder, which is made with those above it. parents: those above a file are made, too.
    """
    from train.config import ConfigError

    path = str(path)
    folder = os.path.dirname(path) or "."
    while (parents or path.endswith("/")) and not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    try:  # os.access would ask by the permissions alone, which is not enough on NFS or for root
        if path.endswith("/") or not os.path.exists(path):
            tempfile.TemporaryFile(dir=folder).close()
        elif os.path.isfile(path) or os.path.isdir(path):  # and not a pipe, whose reader this would wait for
            open(path, "ab").close()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error.strerror}): name another") from error


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit code. Errors that the user can correct are one sentence, others a traceback."""
    try:
        command(arguments)
    except Exception as error:
        if reader_left(error):
            return exit_codes.CLOSED
        if (code := exit_code_of(error)) is not None:
            return fail(code, error, everywhere=getattr(error, "everywhere", False))
        sys.excepthook(type(error), error, error.__traceback__)  # torch replaces it: each line then names the rank
        return fail(*_classify(error))
    except KeyboardInterrupt:
        return fail(exit_codes.INTERRUPTED, None)
    report_verdict(0)
    return 0


def reader_left(error: Exception) -> bool:
    """Whether `error` means that the reader of stdout has closed its pipe, as `head` does after its last line."""
    if not isinstance(error, BrokenPipeError):
        return False
    closed = select.poll()
    closed.register(sys.stdout, 0)  # errors are reported without being asked for
    return bool(closed.poll(0))  # else another pipe's, or a socket's


@atexit.register
def drop_what_nobody_reads() -> None:
    """Python itself would report it when the process ends, and change the exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """End a process that was a rank immediately, without Python's shutdown.

    During shutdown, a gloo thread that still holds a tensor would abort the process, and after a GPU error it may hang.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a file on a full disk
            stream.flush()
    os._exit(code)


def fail(code: int, error: Exception | str | None, *, everywhere: bool = False) -> int:
    """Print an error as one sentence on stderr and return `code`. everywhere: the error holds for all nodes.

    The first rank that exits ends the job. So a rank whose error may be the same as rank 0's exits later and stays
    silent if the launcher ends it first; and all ranks wait until every node has left its code for launch/requeue.py.
    """
    report_verdict(code, everywhere=everywhere)
    before = stop_signals.received
    rank, prefix = os.environ.get("RANK", "0"), "error: "

    def ended() -> bool:
        """Whether the launcher has asked this rank to end because another one failed."""
        return stop_signals.received != before

    if rank != "0":
        prefix += f"rank {rank}: "
        if code in (*SAME_ON_ALL_RANKS, *OFTEN_THE_SAME):
            deadline = time.monotonic() + YIELD_SECONDS
            while time.monotonic() < deadline and not ended():
                time.sleep(0.05)
            error = None if code in SAME_ON_ALL_RANKS or ended() else error
    if error is not None and code != exit_codes.STOPPED:  # which the log has said
        with contextlib.suppress(OSError):
            print(f"{prefix}{error}", file=sys.stderr, flush=True)
    if code in FINAL:
        wait_for_verdicts(ended)
    return code


def _classify(error: Exception) -> tuple[int, str | None]:
    """Exit code and sentence for an error without an exit code: out of memory, a transient I/O error, or a crash."""
    text = str(error)
    # torch may not be imported, so its error types are compared by name. Its CPU allocator has no type of its own.
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text))
    ):
        return exit_codes.UNAVAILABLE, (
            "out of memory: see which other processes use it (nvidia-smi, free -h). For a GPU's: lower "
            "train.micro_batch, set train.activation_checkpointing=true, raise zero.stage. For the host's: lower "
            "data.workers or data.prefetch, or ask SLURM for more with --mem"
        )
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return (
            exit_codes.IO_ERROR,
            f"{error.filename or 'a file (see above)'}: {error.strerror}; mend that, and start again",
        )
    return exit_codes.CRASHED, None
