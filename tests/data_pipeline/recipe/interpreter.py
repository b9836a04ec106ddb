"""Defines the recipe's kernels for Triton's interpreter, on the CPU, unless there is a GPU.

Triton reads the setting when a kernel is defined. tests/conftest.py has imported Triton itself with it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import data_pipeline.recipe.launch  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
