"""The check of the kernels' results."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from catmodel.kernels import check


@pytest.mark.slow
def test_kernels_are_right(device):
    """Each module that uses a kernel, in float32 and float16, with padding, dropout and drop-path."""
    generator = torch.get_rng_state()
    rows = check.check(device, 11, check.FEW)
    assert json.loads(json.dumps(rows)) == rows
    assert {row["module"] for row in rows} == set(get_args(get_type_hints(check.Case)["module"]))
    for row in rows:
        assert row["passed"], row
        assert all(0 <= error < 1e-2 for errors in row["errors"].values() for error in errors.values()), row
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "case", {case.module: case for case in check.FEW if case.dtype == "float32"}.values(), ids=lambda case: case.module
)
def test_wrong_kernels_are_detected(device, case):
    """The check fails if a single weight of the module with kernels differs by 0.01."""
    torch.manual_seed(0)
    plain, fused = case.build().to(device), case.build().to(device)
    fused.load_state_dict(plain.state_dict())
    assert check.compare(case, plain, fused, seed=1)["passed"]
    plain.zero_grad()
    fused.zero_grad()
    with torch.no_grad():
        list(fused.parameters())[-4][0, 0] += 0.01  # in the first linear layer
    assert not check.compare(case, plain, fused, seed=1)["passed"]


def test_the_check_fails_if_no_kernel_runs(device):
    with pytest.raises(RuntimeError, match="nothing to check"):
        check.check(device, 0, [replace(check.FEW[0], dtype="float64")])
