"""Runs the kernels in Triton's interpreter, on the CPU, unless there is a GPU.

Triton reads the setting when it is first imported, and again when a kernel is defined, so it must be set before both:
tests/conftest.py imports this module first. Commands that tests start do not inherit the setting.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    import catmodel.kernels

    multiply, cut = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def create_dot(builder, a, b, *arguments):
        """Replaces that of Triton 3.6 to 3.9, which multiplies the bits of bfloat16 as integers."""
        a, b = (builder.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(builder, a, b, *arguments)

    def create_fp_trunc(builder, x, to):
        """Replaces the interpreter's truncation to bfloat16; GPUs round to nearest."""
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut(builder, x, to)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = create_dot, create_fp_trunc
    catmodel.kernels.usable(torch.device("cpu"), torch.float32)  # defines all kernels
    del os.environ["TRITON_INTERPRET"]
