"""Fixtures for the tests of the kernels; interpreter.py says how they run without a GPU."""

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
