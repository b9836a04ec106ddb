"""Resources of each kernel on the A100 (sm_80), H100 and H200 (sm_90), from Triton's compiler. No GPU is needed.

Each module of kernels lists its cases in `cases()`: dicts with name, fn (the kernel), signature (argument -> type in
Triton's notation; "i32:16" is a number divisible by 16), constexprs, num_warps and num_stages.
"""

import importlib
import re
import subprocess
import tempfile
import warnings

MODULES = ("inner_patch", "cross_patch", "flash", "pack", "mlp", "norm", "aggregate")
HOPPER_ONLY = ("mlp",)  # its kernels need the tensor memory accelerator

# Limits of a multiprocessor (CUDA C++ programming guide, technical specifications). Its bytes of shared memory by
# compute capability; the others are the same for both.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, QUARTERS, WARPS, BLOCKS = 65536, 4, 64, 32
SHARED_RESERVED = 1024  # by the system, in each block


def resources(capability: int) -> list[dict]:
    """A dict for each kernel, compiled for a compute capability in SHARED.

    name, capability; registers per thread; spilled, the bytes of a thread's registers that are kept in memory; if there
    are any, spills_in_loops, the instructions within loops that load or store these, of instructions_in_loops; shared,
    in bytes per block; warps per block; blocks_per_sm and warps_per_sm, resident at once; limit, the resource that
    prevents more.
    """
    modules = [name for name in MODULES if capability >= 90 or name not in HOPPER_ONLY]
    cases = [case for name in modules for case in importlib.import_module(f"catmodel.kernels.{name}").cases()]
    return [_resources(case, capability) for case in cases]


def _resources(case: dict, capability: int) -> dict:
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
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": case["num_warps"], "num_stages": case["num_stages"]},
        )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    cuobjdump, cubin = triton.knobs.nvidia.cuobjdump.path, compiled.asm["cubin"]
    used = usage(cuobjdump, cubin)
    spilled = used["stack"] + used["local"]
    blocks, limit = occupancy(used["registers"], shared, warps, capability)
    return dict(
        name=case["name"],
        capability=capability,
        registers=used["registers"],
        spilled=spilled,
        **(spills_in_loops(cuobjdump, cubin) if spilled else {}),
        shared=shared,
        warps=warps,
        blocks_per_sm=blocks,
        warps_per_sm=blocks * warps,
        limit=limit,
    )


def usage(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, as NVIDIA's `cuobjdump` reads them from a compiled kernel."""
    text = _dumped(cuobjdump, "--dump-resource-usage", cubin)
    return {
        name: int(re.search(rf"\b{key}:(\d+)", text).group(1))
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def spills_in_loops(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Of a compiled kernel's instructions within loops, those that load or store local memory, and all."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;\n]*);", _dumped(cuobjdump, "--dump-sass", cubin))
    code = {int(address, 16): instruction for address, instruction in found}
    branches = [(re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction), last) for last, instruction in code.items()]
    loops = [range(int(branch[1], 16), last + 1) for branch, last in branches if branch and int(branch[1], 16) < last]
    inside = [instruction for address, instruction in code.items() if any(address in loop for loop in loops)]
    spills = [instruction for instruction in inside if re.search(r"\b(LDL|STL)\b", instruction)]
    return dict(spills_in_loops=len(spills), instructions_in_loops=len(inside))


def _dumped(cuobjdump: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout


def occupancy(registers: int, shared: int, warps: int, capability: int) -> tuple[int, str]:
    """Number of blocks resident on a multiprocessor at once, and the resource that limits it."""
    # Registers are allocated to warps in units of 256, from the quarter of the multiprocessor on which the warp runs.
    of_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": REGISTERS // QUARTERS // of_warp * QUARTERS // warps,
        "shared": SHARED[capability] // (-(-shared // 128) * 128 + SHARED_RESERVED),
        "warps": min(WARPS // warps, BLOCKS),
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit
