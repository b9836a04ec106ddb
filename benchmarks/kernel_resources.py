"""Resources of each kernel on the H100 and H200 (sm_90), from Triton's compiler. No GPU is needed.

Each module of kernels lists its cases in `cases()`: dicts with name, fn (the kernel), signature (argument -> type in
Triton's notation; "i32:16" is a number divisible by 16), constexprs, num_warps and num_stages.
"""

import importlib
import re
import subprocess
import tempfile
import warnings
from collections.abc import Sequence

MODULES = ("inner_patch", "cross_patch", "flash", "pack", "mlp", "norm", "aggregate")

# Limits of a multiprocessor of compute capability 9.0 (CUDA C++ programming guide, technical specifications).
REGISTERS, QUARTERS, WARPS, BLOCKS = 65536, 4, 64, 32
SHARED = 228 * 1024
SHARED_RESERVED = 1024  # by the system, in each block


def resources(modules: Sequence[str] = MODULES) -> list[dict]:
    """A dict for each case of the modules.

    name; registers per thread; stack and local, in bytes per thread (in Triton's kernels these are spilled registers);
    shared, in bytes per block; warps per block; blocks_per_sm and warps_per_sm, resident at once; limit, the resource
    that prevents more.
    """
    return [
        _resources(case) for name in modules for case in importlib.import_module(f"catmodel.kernels.{name}").cases()
    ]


def _resources(case: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, kinds = case["fn"], {name: kind.partition(":") for name, kind in case["signature"].items()}
    # As in a launch, tensors are aligned to 16 bytes, which Triton's compiler uses.
    aligned = [i for i, name in enumerate(fn.arg_names) if kinds[name][0].startswith("*") or kinds[name][2] == "16"]
    source = ASTSource(
        fn,
        {name: kinds[name][0] for name in fn.arg_names},
        case["constexprs"],
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton warns of settings that will change
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": case["num_warps"], "num_stages": case["num_stages"]},
        )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    used = usage(triton.knobs.nvidia.cuobjdump.path, compiled.asm["cubin"])
    blocks, limit = occupancy(used["registers"], shared, warps)
    resident = dict(blocks_per_sm=blocks, warps_per_sm=blocks * warps, limit=limit)
    return dict(name=case["name"], **used, shared=shared, warps=warps, **resident)


def usage(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, as NVIDIA's `cuobjdump` reads them from a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"\b{key}:(\d+)", text).group(1))
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def occupancy(registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Number of blocks resident on a multiprocessor at once, and the resource that limits it."""
    # Registers are allocated to warps in units of 256, from the quarter of the multiprocessor on which the warp runs.
    of_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": REGISTERS // QUARTERS // of_warp * QUARTERS // warps,
        "shared": SHARED // (-(-shared // 128) * 128 + SHARED_RESERVED),
        "warps": min(WARPS // warps, BLOCKS),
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit
