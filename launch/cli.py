"""What the commands share: exit codes, and how an error is said."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from launch.ranks import report_verdict

EXIT_DATA, EXIT_FAILED, EXIT_NOT_SAVED, EXIT_STOPPED, EXIT_CONFIG = 65, 70, 74, 75, 78


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code and form for bad arguments."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(EXIT_CONFIG, f"{message} (see --help)"))


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """The command's exit code: 0, or that of an error the user can mend, said in one sentence. Other errors keep their traceback."""
    try:
        command(arguments)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        return fail(error.exit_code, error)
    report_verdict(0)
    return 0


def leave(code: int) -> NoReturn:
    """End a process that was a rank, at once: while Python shuts down, a thread of gloo that still has a tensor to drop would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(code: int, error: Exception | str) -> int:
    """One sentence on stderr.

    Bad data may be known to one rank alone, everything else is known to all: rank 0 says it, and the others wait, as the first to leave
    ends the job.
    """
    report_verdict(code)
    if code == EXIT_DATA or os.environ.get("RANK", "0") == "0":
        print(error if code == EXIT_STOPPED else f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    return code
