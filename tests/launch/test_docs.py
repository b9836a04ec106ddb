"""The tables of docs/ are made of docs/results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def docs(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "launch/docs.py"), *arguments], capture_output=True, text=True)


def test_no_page_is_stale():
    done = docs(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_every_table_is_on_a_page():
    from launch.docs import TABLE
    from launch.tables import TABLES

    used = [found[1] for page in (ROOT / "docs").glob("*.md") for found in TABLE.findall(page.read_text())]
    assert sorted(used) == sorted(TABLES)


@pytest.mark.parametrize("name", ["gpu-gradients", "models"])
def test_a_new_result_makes_its_page_stale_until_it_is_made_anew(tmp_path, name):
    for folder in ("launch", "docs", "train"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / f"docs/results/{name}.json"
    if name == "models":
        page, line = "docs/models.md", "| cat_tiny | 224 | 123,456,789 | 17M | +626.2% |"
        result = json.loads(path.read_text())
        result["counts"][1]["parameters"] = 123_456_789
    else:
        page, line = "docs/performance.md", "| gradients | passed | 3 | 0 of 7 differ | a new GPU | 2030-01-02 |"
        result = {"passed": True, "says": "0 of 7 differ", "seconds": 3.0, "machine": "a new GPU", "date": "2030-01-02"}
    path.write_text(json.dumps(result))
    stale = docs(tmp_path, "--check")
    assert stale.returncode == 1 and stale.stderr.startswith(f"{page}: ") and "run python launch/docs.py" in stale.stderr
    assert docs(tmp_path).returncode == docs(tmp_path, "--check").returncode == 0
    assert line in (tmp_path / page).read_text()
