import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_resources import occupancy

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_compile_for_the_h200_without_one():
    """The MLP spills nothing; in bfloat16 a multiprocessor holds two blocks."""
    code = "import json; from benchmarks.kernel_resources import resources; print(json.dumps(resources(['mlp'])))"
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # in the tests' process the kernels are the interpreter's
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["name"].split(",")[0] for row in rows} == {"mlp inference", "mlp forward", "mlp backward"}
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert 0 < row["shared"] < 227 * 1024
        assert row["blocks_per_sm"] >= 2 or "float32" in row["name"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (24, 0, 8, (8, "warps")),  # 64 warps in all
        (64, 0, 8, (4, "registers")),
        (65, 0, 8, (3, "registers")),  # allocated in units of eight per thread
        (255, 0, 4, (2, "registers")),
        (168, 0, 4, (3, "registers")),
        (40, 100 * 1024, 4, (2, "shared")),
        (40, 227 * 1024, 4, (1, "shared")),
        (16, 0, 1, (32, "warps")),  # 32 blocks at most
    ],
)
def test_occupancy_is_that_of_nvidias_calculator(registers, shared, warps, expected):
    assert occupancy(registers, shared, warps) == expected
