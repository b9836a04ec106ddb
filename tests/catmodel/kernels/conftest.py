"""Kernels run in Triton's interpreter here, on the CPU, unless there is a GPU.

Triton decides when it is first imported, and for every kernel when that is defined: so this comes before both. Commands that tests
start do not inherit it.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    import catmodel.kernels

    catmodel.kernels.usable(torch.device("cpu"), torch.float32)  # defines them all
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
