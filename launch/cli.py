"""What the commands share: exit codes, and how an error is said."""

import os
import sys
import time

EXIT_DATA, EXIT_FAILED, EXIT_STOPPED, EXIT_CONFIG = 65, 70, 75, 78


def fail(code: int, error: Exception) -> int:
    """One sentence on stderr, from rank 0 where all ranks know the same; the others wait, as the first to leave ends the job."""
    if code != EXIT_CONFIG or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    return code
