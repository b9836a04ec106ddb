"""The laboratory of kernels, without a GPU: every way is right in the interpreter, and rows say what is counted."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu import kernel_lab

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_ways_are_rehearsed(tmp_path):
    """Stage 1's kernels in all their tiles, in Triton's interpreter."""
    command = [sys.executable, "launch/gpu.py", "--rehearse", "--parts", "lab", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu-lab.json").read_text())["rows"]
    groups = {"mlp forward": 8, "mlp backward": 5, "norm forward": 1, "norm backward": 5}
    assert Counter(row["group"] for row in rows) == groups
    assert all(row["error"] < 0.01 for row in rows)


def test_the_judge_names_what_is_faster_or_wrong():
    row = {"group": "mlp forward", "stage": 3, "error": 1e-3}
    rows = [row | {"name": way, "way": way, "microseconds": us} for way, us in (("kernel", 167.0), ("delay", 120.0))]
    assert kernel_lab.judge(rows) == (True, "mlp forward 3: delay 120 µs, the kernel 167")
    assert kernel_lab.judge([rows[0]]) == (True, "1 ways, none faster than the kernels")
    assert kernel_lab.judge([rows[0] | {"error": 0.1}]) == (False, "WRONG: kernel")


def test_a_row_counts_bytes_and_operations():
    """Stage 1, 256 images: 802,816 tokens of 96 channels, 9 C elements of two bytes and 2 * 4C * C operations each."""
    case = next(c for c in kernel_lab.cases() if (c.group, c.stage) == ("mlp forward", 1))
    row = kernel_lab.row(case, 256, 500.0, 0.001)
    assert row["floor"] == pytest.approx(802816 * 96 * 9 * 2 / kernel_lab.BANDWIDTH * 1e6, abs=0.1)
    assert row["gb_per_s"] == round(802816 * 96 * 9 * 2 / 500e-6 / 1e9)
    assert row["tflop_per_s"] == round(2 * 802816 * 96 * 384 / 500e-6 / 1e12)
