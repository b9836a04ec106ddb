"""The laboratory of kernels, without a GPU: every way is right in the interpreter, and rows say what is counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import kernel_lab

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("only", ["norm backward 4", "mlp forward 1", "mlp backward 2"])
def test_ways_are_rehearsed_in_workers(only):
    command = [sys.executable, "-m", "benchmarks.gpu.kernel_lab", "--rehearse", "--only", only]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{only} kernel: ") and len(lines) >= 5
    assert all(line.startswith(only) and float(line.split(": ")[1]) < 0.01 for line in lines)


def test_a_row_counts_bytes_and_operations():
    """Stage 1, 256 images: 802,816 tokens of 96 channels, 9 C elements of two bytes and 2 * 4C * C operations each."""
    case = next(c for c in kernel_lab.cases() if (c.group, c.stage) == ("mlp forward", 1))
    row = kernel_lab.row(case, 256, 500.0, 0.001)
    assert row["floor"] == pytest.approx(802816 * 96 * 9 * 2 / kernel_lab.BANDWIDTH * 1e6, abs=0.1)
    assert row["gb_per_s"] == round(802816 * 96 * 9 * 2 / 500e-6 / 1e9)
    assert row["tflop_per_s"] == round(2 * 802816 * 96 * 384 / 500e-6 / 1e12)
