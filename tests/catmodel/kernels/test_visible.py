"""torch.compile launches the kernels itself, as they would launch themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# (warps, stages), from the plans of the kernels, for patches of 7 x 7, heads of 16 channels, and maps of CoTNeXt.
OPTIONS = {
    "CAT": {
        "inner_patch_forward": (4, 2),
        "inner_patch_backward": (4, 2),
        "cross_patch_forward": (4, 1),
        "cross_patch_backward": (4, 1),
        "cross_patch_unfold": (8, 1),
        "norm_forward": (4, 3),
        "norm_backward": (4, 3),
        "transpose_places": (4, 1),
    },
    "CoTNeXt": {"aggregate_forward": (8, 1), "aggregate_backward": (8, 1)},
    "PVT": {
        "flash_forward": (4, 1),
        "flash_backward_q": (4, 1),
        "flash_backward_kv": (4, 1),
        "norm_forward": (4, 3),
        "norm_backward": (4, 3),
    },
}
LAUNCHES = {"CAT": [18, 20], "CoTNeXt": [1, 1], "PVT": [4, 6]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("CAT", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("CoTNeXt", "PVT")),
    ],
)
def test_compiled_steps_launch_the_kernels_themselves(name):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.catmodel.kernels.visible_steps", name]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert [operator for operator in found["opaque"] if "mlp" not in operator] == []
    assert found["launches"] == LAUNCHES[name]
    assert found["atomic"] == [False, False]
    assert found["copied"] == 0
    assert set().union(*found["compiled"]) == {f"_{kernel}" for kernel in OPTIONS[name]}
    # Several options of a kernel would be timed at run time, and others might win after a restart.
    chosen = {kernel: [tuple(each.values()) for each in options] for kernel, options in found["options"].items()}
    assert chosen == {kernel: [options] for kernel, options in OPTIONS[name].items()}


def test_no_kernel_adds_atomically():
    """Those of the MLP are not visible in the code above."""
    for path in (ROOT / "catmodel/kernels").glob("*.py"):
        assert "tl.atomic" not in path.read_text(), path.name
