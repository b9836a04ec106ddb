"""The report of the kernels' resources, and the check of their results."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from catmodel.kernels import check, report

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kernels_compile_for_the_h200_without_one(tmp_path):
    """The table and the JSON name every case. The MLP spills nothing; in bfloat16 a multiprocessor holds two blocks."""
    command = [sys.executable, "-m", "catmodel.kernels.report", "mlp", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())
    assert all(row["name"] in done.stdout for row in rows)
    assert {row["name"].split(",")[0] for row in rows} == {"mlp inference", "mlp forward", "mlp backward"}
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert 0 < row["shared"] < 227 * 1024
        assert row["blocks_per_sm"] >= 2 or "float32" in row["name"]


@pytest.mark.parametrize(("argument", "message"), [("mlp", "unset it"), ("gemm", "gemm: not among inner_patch, ")])
def test_invalid_arguments_of_the_report(argument, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        report.main([argument])
    assert message in capsys.readouterr().err


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
    assert report.occupancy(registers, shared, warps) == expected


@pytest.mark.slow
def test_kernels_are_right(device):
    """Each module that uses a kernel, in float32 and float16, with padding and dropout."""
    generator = torch.get_rng_state()
    rows = check.check(device, 11, check.FEW)
    assert json.loads(json.dumps(rows)) == rows
    assert {row["module"] for row in rows} == {"inner_patch", "cross_patch", "mlp", "aggregate"}
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
