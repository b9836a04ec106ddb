"""The compiled decoder (data_pipeline/native). It is optional: if it does not build, a warning is printed.

The rest of the package is described in pyproject.toml. The library is not a Python module (it has no PyInit function).
As an Extension, setuptools builds it in wheels and in editable installs, and puts it beside
data_pipeline/native/__init__.py.
"""

from setuptools import Extension, setup

NATIVE = "data_pipeline/native"

setup(
    ext_modules=[
        Extension(
            "data_pipeline.native.library",
            sources=[f"{NATIVE}/{name}.c" for name in ("decode", "huffman", "read", "resample", "resample_avx2")],
            depends=[f"{NATIVE}/{name}.h" for name in ("decode", "huffman", "resample")],
            libraries=["jpeg", "m"],
            # No fused multiply-add in the weights: the same bits on every machine.
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
