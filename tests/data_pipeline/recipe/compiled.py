"""Compiles the recipe's kernels without a GPU and prints their resources as JSON: python -m tests….compiled

In a process of its own, because in the tests' the kernels are defined for Triton's interpreter.
"""

import json
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_resources import occupancy, usage
from data_pipeline.recipe import launch

POINTERS = {
    "images_ptr": "*u8",
    "tables_ptr": "*u8",
    "counts_ptr": "*i32",
    "program_ptr": "*i64",
    "labels_ptr": "*i64",
}
INTEGERS = ("columns", "column", "size", "chunks", "classes", "stride_image", "stride_channel", "stride_y", "stride_x")
CONSTANTS = {"ERASE": True, "NOISE": True}
# The strides that are 1, and the integers that are divisible by 16, for images of 224 pixels.
LAYOUTS = {
    "channels-last": ("stride_channel", ("size", "stride_image", "stride_y")),
    "planar": ("stride_x", ("size", "stride_image", "stride_y", "stride_channel")),
}
CASES = {
    "count_levels": (launch.COUNT_BLOCK, "*u8", LAYOUTS),
    "make_tables": (None, "*u8", {"": LAYOUTS["planar"]}),
    "apply_round": (launch.BLOCK, "*u8", LAYOUTS),
    "finish_images": (launch.BLOCK, "*fp32", LAYOUTS),
    "finish_targets": (launch.CLASSES, "*fp32", {"": LAYOUTS["planar"]}),
}


def resources(name: str, layout: str, capability: int) -> dict:
    block, found, layouts = CASES[name]
    kernel, (one, divisible) = getattr(launch, name), layouts[layout]
    names = kernel.arg_names
    constants = {key: value for key, value in (CONSTANTS | {"BLOCK": block, one: 1}).items() if key in names}
    kinds = POINTERS | {"found_ptr": found} | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {key: kinds.get(key, "fp32") for key in names}
    aligned = [i for i, key in enumerate(names) if signature[key].startswith("*") or key in divisible]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton warns of settings that will change
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.OPTIONS)
    used = usage(triton.knobs.nvidia.cuobjdump.path, compiled.asm["cubin"])
    blocks, _ = occupancy(used["registers"], compiled.metadata.shared, compiled.metadata.num_warps, capability)
    resident = blocks * compiled.metadata.num_warps
    return dict(name=f"{name}, {layout}", capability=capability, **used, warps_per_sm=resident)


if __name__ == "__main__":
    rows = [
        resources(name, layout, capability) for capability in (80, 90) for name in CASES for layout in CASES[name][2]
    ]
    print(json.dumps(rows))
