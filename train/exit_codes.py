"""Exit codes of all commands, after sysexits.h, and what each of them means. Standard library only."""

import os
from typing import NamedTuple

CRASHED = 1
BAD_DATA = os.EX_DATAERR  # 65
UNAVAILABLE = os.EX_UNAVAILABLE  # 69
FAILED = os.EX_SOFTWARE  # 70
HUNG = os.EX_OSERR  # 71
IO_ERROR = os.EX_IOERR  # 74
STOPPED = os.EX_TEMPFAIL  # 75
BAD_CONFIG = os.EX_CONFIG  # 78
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
CLOSED = 141  # 128 + SIGPIPE: the reader of a command's output has closed its pipe


class Failure(NamedTuple):
    """A row of the table in docs/failures.md."""

    what: str
    who: str  # which ranks or nodes end with the code
    codes: tuple[int, ...]  # empty: any other code
    again: bool  # whether the run is started again


FAILURES = (
    Failure("finished", "rank 0", (0,), False),
    Failure("bad data: samples that cannot be read, an incomplete dataset", "every node", (BAD_DATA,), False),
    Failure("a port is in use", "rank 0", (UNAVAILABLE,), True),
    Failure("out of memory", "any rank", (UNAVAILABLE,), True),
    Failure("a node's GPUs cannot be used", "any rank", (UNAVAILABLE,), True),
    Failure("training failed: gradients that are not finite", "every node", (FAILED,), False),
    Failure("a rank hangs, or ranks do not find each other", "any rank", (HUNG,), True),
    Failure(
        "files cannot be read or written: an I/O error, a full disk, the last checkpoint",
        "any rank",
        (IO_ERROR,),
        True,
    ),
    Failure("stopped on request, or not in time", "any rank", (STOPPED,), True),
    Failure(
        "bad configuration: a config that is refused, settings changed, the folder is in use",
        "every node",
        (BAD_CONFIG,),
        False,
    ),
    Failure("one node differs", "some nodes", (BAD_DATA, FAILED, BAD_CONFIG), True),
    Failure("a rank crashes, or NCCL or gloo has lost a neighbour", "any rank", (CRASHED,), True),
    Failure("a rank is killed", "any rank", (), True),
)
# Code -> reason, for codes after which another start would end the same way, if every node has reported them.
FINAL = {code: failure.what.partition(":")[0] for failure in FAILURES if not failure.again for code in failure.codes}


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that the user can correct; None for any other error, which is a crash.

    Such errors have a class attribute `exit_code`, rather than a common base: `data_pipeline` defines some of them and
    imports nothing of `train`.
    """
    return getattr(error, "exit_code", None)
