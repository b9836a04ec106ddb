import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_resources import occupancy

ROOT = Path(__file__).parents[2]
RESOURCES = "import json, sys; from benchmarks.kernel_resources import resources; print(json.dumps(resources({})))"

# The most bytes of a thread's registers that are spilled, and the most instructions within the loop that load or store
# them. The other kernels spill nothing.
SPILLS = {
    # At most 2 of 100 instructions of the loop, nearly all of them loads of values that stay the same.
    (80, "cross-patch backward, 64 patches"): (88, 22),
    (80, "cross-patch backward, 16 patches"): (72, 19),
    (80, "cross-patch backward, 4 patches"): (88, 25),
    (80, "cross-patch backward, 1 patches"): (88, 29),
    # One, and 3 of 100 instructions of the loop. No config has such patches.
    (90, "inner-patch backward, 12 x 12"): (64, 16),
    (80, "inner-patch backward, 12 x 12"): (200, 59),
    # Outside of the loop, once in a program.
    (80, "inner-patch backward, dropout"): (16, 0),
    (80, "flash attention, backward of q"): (96, 0),
    (80, "flash attention, backward of k and v"): (112, 0),
    (80, "flash cross-attention, forward"): (8, 0),
    (80, "flash cross-attention, backward of q"): (16, 0),
    # Without a loop, by four programs in a launch.
    (80, "cross-patch parameters"): (96, 0),
    (90, "cross-patch parameters"): (80, 0),
}


@pytest.mark.parametrize(
    "capability", [pytest.param(90, marks=pytest.mark.slow), pytest.param(80, marks=pytest.mark.long)]
)
def test_kernels_compile_without_a_gpu_and_spill_little(capability):
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # in the tests' process the kernels are the interpreter's
    command = [sys.executable, "-c", RESOURCES.format(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    found = {(capability, row["name"]): (row["spilled"], row["spills_in_loops"]) for row in rows if row["spilled"]}
    assert found.keys() == {key for key in SPILLS if key[0] == capability}
    for key, (spilled, in_loops) in found.items():
        limit, limit_in_loops = SPILLS[key]
        assert spilled <= limit and in_loops <= limit_in_loops, (key, spilled, in_loops)
        assert bool(in_loops) == bool(limit_in_loops), key
    for row in rows:
        assert 0 < row["registers"] < 256 and row["shared"] < {80: 163, 90: 227}[capability] * 1024, row
        # In bfloat16, a multiprocessor holds two blocks of the MLP.
        assert row["blocks_per_sm"] >= (2 if "mlp" in row["name"] and "float32" not in row["name"] else 1), row


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "expected"),
    [
        (24, 0, 8, 90, (8, "warps")),  # 64 warps in all
        (64, 0, 8, 90, (4, "registers")),
        (65, 0, 8, 90, (3, "registers")),  # allocated in units of eight per thread
        (255, 0, 4, 90, (2, "registers")),
        (168, 0, 4, 90, (3, "registers")),
        (40, 100 * 1024, 4, 90, (2, "shared")),
        (40, 100 * 1024, 4, 80, (1, "shared")),
        (40, 227 * 1024, 4, 90, (1, "shared")),
        (16, 0, 1, 90, (32, "warps")),  # 32 blocks at most
    ],
)
def test_occupancy_is_that_of_nvidias_calculator(registers, shared, warps, capability, expected):
    assert occupancy(registers, shared, warps, capability) == expected
