"""docs/performance.md is made of docs/results."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def performance(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "launch/performance.py"), *arguments], capture_output=True, text=True)


def test_the_page_is_not_stale():
    done = performance(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_a_new_result_makes_the_page_stale_until_it_is_made_anew(tmp_path):
    for name in ("launch", "docs", "train"):
        shutil.copytree(ROOT / name, tmp_path / name)
    path = tmp_path / "docs/results/gpu-gradients.json"
    path.write_text('{"passed": true, "says": "0 of 7 differ", "seconds": 3.0, "machine": "a new GPU", "date": "2030-01-02"}\n')
    stale = performance(tmp_path, "--check")
    assert stale.returncode == 1 and "run python launch/performance.py" in stale.stderr
    assert performance(tmp_path).returncode == performance(tmp_path, "--check").returncode == 0
    assert "| gradients | passed | 3 | 0 of 7 differ | a new GPU | 2030-01-02 |" in (tmp_path / "docs/performance.md").read_text()
