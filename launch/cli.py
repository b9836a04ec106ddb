"""What the commands share: exit codes, and how an error is said."""

import argparse
import os
import sys
import time
from typing import NoReturn

EXIT_DATA, EXIT_FAILED, EXIT_CONFIG = 65, 70, 78


class Parser(argparse.ArgumentParser):
    """argparse with this project's exit code and form for bad arguments."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(EXIT_CONFIG, f"{message} (see --help)"))


def fail(code: int, error: Exception | str) -> int:
    """One sentence on stderr.

    A bad configuration is known to all ranks: rank 0 says it, and the others wait, as the first to leave ends the job.
    """
    if code != EXIT_CONFIG or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    return code
