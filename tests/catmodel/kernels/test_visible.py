"""torch.compile launches the kernels itself, as they would launch themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPTIONS = {  # from the plans of the kernels, for patches of 7 x 7, heads of 16 channels, and maps of CoTNeXt
    "CAT": {
        "forward": [{"num_warps": 4, "num_stages": stages} for stages in (1, 2, 3)],
        "backward": [{"num_warps": 4, "num_stages": stages} for stages in (1, 2, 3)],
        "transpose": [{"num_warps": 4, "num_stages": 1}],
    },
    "CoTNeXt": {
        "forward": [{"num_warps": 8, "num_stages": 1}],
        "backward": [{"num_warps": 8, "num_stages": 1}],
    },
    "PVT": {
        "forward": [{"num_warps": 4, "num_stages": stages} for stages in (1, 3)],
        "backward": [{"num_warps": 4, "num_stages": 3}],
        "backward_q": [{"num_warps": 4, "num_stages": 1}],
        "backward_kv": [{"num_warps": 4, "num_stages": 1}],
    },
}
LAUNCHES = {"CAT": [20, 20], "CoTNeXt": [1, 1], "PVT": [4, 6]}


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
    assert found["copied"] == 0
    assert set().union(*found["compiled"]) == {f"_{kernel}" for kernel in OPTIONS[name]}
    assert found["options"].keys() == OPTIONS[name].keys()
    for kernel, options in found["options"].items():
        (chosen,) = options  # several would be timed at run time, and another one might win after a restart
        assert chosen in OPTIONS[name][kernel]
