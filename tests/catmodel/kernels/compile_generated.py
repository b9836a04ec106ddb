"""Compiles the kernels of ours that Inductor's code contains, with the types that Inductor gives their arguments."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import triton
from torch._inductor.runtime import triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SOURCE = re.compile(r"async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.S)


def compile_kernels(code: str, folder: Path, capability: int = 90) -> list[str]:
    """Compile them for GPUs of a compute capability, without one; returns their names.

    code: Inductor's, of one graph. folder: for their sources, which Triton reads from files. Raises what Triton raises.
    """
    names = []
    for number, text in enumerate(part for part in SOURCE.findall(code) if "user_autotune" in part):
        path = folder / f"kernel_{number}.py"
        path.write_text(text)
        function, options, meta = _kernel_of(path)
        source = ASTSource(function, meta["signature"], meta["constants"], meta["configs"][0])
        launch = {key: options[key] for key in ("num_warps", "num_stages")}
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        names.append(function.__name__)
    return names


def _kernel_of(path: Path) -> tuple[triton.JITFunction, dict, dict]:
    """The kernel that a source file defines, its launch options, and what Inductor knows of its arguments."""
    found = []

    def keep(configs: list[dict], triton_meta: dict, **settings: object) -> Callable:
        return lambda function: found.append((function, configs[0], triton_meta))

    spec = importlib.util.spec_from_file_location(path.stem, path)
    with mock.patch.object(triton_heuristics, "user_autotune", keep):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (kernel,) = found
    return kernel
