"""tests/skips.py, in sessions of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import pytest

def test_that_passes():
    pass

@pytest.mark.xfail
def test_that_fails():
    assert False

@pytest.mark.skipif(True, reason="needs a GPU")
def test_on_a_gpu():
    pass
"""
FORGOTTEN = """
def test_of_a_library():
    pytest.importorskip("no_such_library")
"""
MODULE = """
import pytest

pytest.skip("no such folder", allow_module_level=True)
"""


def run(folder: Path, ci: str, *options: str) -> subprocess.CompletedProcess:
    """Runs the tests in `folder` with the plugin."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", f"--rootdir={folder}", *options, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CI": ci}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_known_reasons_are_allowed(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    allowed = run(tmp_path, "true")
    assert allowed.returncode == 0 and "1 passed, 1 skipped, 1 xfailed" in allowed.stdout, allowed.stdout
    assert "NOT ALLOWED" not in allowed.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_an_unexpected_skip_fails_the_session_and_is_named(tmp_path, options):
    (tmp_path / "test_some.py").write_text(TESTS + FORGOTTEN)
    (tmp_path / "test_module.py").write_text(MODULE)
    refused = run(tmp_path, "true", *options)
    assert refused.returncode == 1 and "1 passed, 3 skipped, 1 xfailed" in refused.stdout, refused.stdout
    named = [line.partition("tests/skips.py): ")[2] for line in refused.stdout.splitlines() if "NOT ALLOWED" in line]
    assert sorted(line.partition(": ")[0] for line in named) == ["test_module.py", "test_some.py::test_of_a_library"]
    assert any("no such folder" in line for line in named) and any("no_such_library" in line for line in named)


@pytest.mark.slow
def test_outside_of_ci_any_test_may_be_skipped(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS + FORGOTTEN)
    assert run(tmp_path, "").returncode == 0
