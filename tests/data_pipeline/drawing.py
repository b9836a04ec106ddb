"""The programs in examples/ that draw datasets."""

import subprocess
import sys
from pathlib import Path

from tests.data_pipeline.images import contents

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def draw(program: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def check_drawing(program: str, folder: Path, *arguments) -> dict[str, str]:
    """Assert that the dataset is reproducible and not drawn twice. Returns the SHA-256 of its files, in folder/one."""
    for dest in ("one", "two"):
        assert draw(program, folder / dest, *arguments).returncode == 0
    drawn = contents(folder / "one")
    assert drawn == contents(folder / "two")
    again = draw(program, folder / "one", *arguments)
    assert again.returncode == 0 and "already drawn" in again.stdout
    other = draw(program, folder / "one", *arguments, "--seed", 1)
    assert other.returncode == 78 and "drawn with other arguments" in other.stderr
    return drawn
