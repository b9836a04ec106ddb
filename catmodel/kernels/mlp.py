"""The MLP's matrix products with the exact GELU, or its derivative, in their epilogues.

Elements moved per token, for C channels and 4C hidden channels:

                 PyTorch                                               these kernels
    inference    fc1 5C, GELU 8C, fc2 5C                       = 18C   5C + 5C                           = 10C
    forward      the same                                      = 18C   fc1 with GELU and GELU' 9C, fc2 5C = 14C
    backward     dA 5C, GELU' 12C, dW1 5C, dW2 5C, dx 5C,              dA times GELU' 9C, others 15C     = 24C
                 db1 4C                                        = 36C

Instead of the hidden layer before the GELU, forward stores GELU' of it: the backward pass then only multiplies. If no
second bias is given, the caller adds it, and computes its gradient.

Microseconds of the first product with the GELU, and of its gradient, in the stages of CAT-B (batch 256, bf16, one H200,
docs/results/h200-2026-11-27/kernel-lab.json), and those of cuBLAS with the passes that Inductor makes:

                 stage 1      2            3            4
    forward      509 / 736    271 / 354    167 / 218    121 / 149
    backward     440 / 973    291 / 507    175 / 297    122 / 190
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from catmodel.kernels.gelu import gelu, gelu_and_slope
from catmodel.kernels.launch import blocks, operator, programs


@triton.jit
def _mlp_forward(
    x,  # descriptor of [M, K], in tiles [ROWS, INNER]
    w,  # of [N, K], in [COLUMNS, INNER]
    bias_ptr,  # [N]
    slope,  # of [M, N], in [ROWS, COLUMNS / 2]: GELU'(x w^T + bias), or None
    out,  # as slope: GELU(x w^T + bias)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    DELAY: tl.constexpr = 0,
):
    """Some of the tiles, in turn: the next one is loaded while the last one is finished.

    DELAY: the second half of the programs first waits for so many steps of some nanoseconds. The two programs of a
    multiprocessor may then take turns: one multiplies while the other computes the GELU. Only benchmarks/gpu/ sets it.
    """
    across: tl.constexpr = tl.cdiv(N, COLUMNS)
    HALF: tl.constexpr = COLUMNS // 2
    exact: tl.constexpr = out.dtype == tl.float32
    if DELAY > 0 and tl.program_id(0) * 2 >= tl.num_programs(0):
        count = tl.full((), 0.0, tl.float32) + M
        for _ in range(DELAY):
            count = count * 0.5 + 1.0
        M += (count < 0.0).to(tl.int32)  # 0, which the compiler does not know
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * across, tl.num_programs(0), flatten=True):
        # Consecutive tiles share rows: x stays in the L2.
        row, start = tile // across * ROWS, tile % across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, INNER):
            total = tl.dot(x.load([row, k]), w.load([start, k]).T, total, input_precision="ieee")
        # A half at a time, which takes half the registers and shared memory.
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            first = start + half * HALF
            column = first + tl.arange(0, HALF)
            h = halves[half] + tl.load(bias_ptr + column, column < N, 0.0).to(tl.float32)[None, :]
            if slope is not None:
                value, derivative = gelu_and_slope(h, exact)
                slope.store([row, first], derivative.to(out.dtype))
            else:
                value = gelu(h, exact)
            out.store([row, first], value.to(out.dtype))


@triton.jit
def _mlp_backward(
    x,  # descriptor of [M, K], in tiles [ROWS, INNER]
    w,  # of [K, N], in [INNER, COLUMNS]
    slope,  # of [M, N], in [ROWS, COLUMNS]
    out,  # as slope: (x w) * slope
    sums_ptr,  # [tiles of M, N] float32: `out` summed over each tile's rows
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile. Consecutive ones share rows: x stays in the L2."""
    across: tl.constexpr = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0)
    row, start = tile // across * ROWS, tile % across * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, INNER):
        total = tl.dot(x.load([row, k]), w.load([k, start]), total, input_precision="ieee")
    result = (total * slope.load([row, start]).to(tl.float32)).to(out.dtype)  # 0 in rows beyond M
    if out.dtype == tl.float32:
        sums = tl.sum(result, 0)
    else:  # a product with ones: three shuffles for each element would take longer than the rest of the kernel
        ones = tl.full((ROWS, 16), 1.0, tl.float32).to(out.dtype)
        sums = tl.sum(tl.dot(tl.trans(result), ones), 1) * 0.0625
    tl.store(sums_ptr + tile // across * N + column, sums, column < N)
    out.store([row, start], result)


Plan = tuple[dict[str, int], dict[str, int]]  # sizes of tiles, and launch options


def _plan(channels: int, backward: bool, dtype: torch.dtype) -> Plan:
    """Sizes of tiles, and launch options: the fastest of those that were timed on an H200 (docs/gpu.md).

    Every other GPU with a tensor memory accelerator gets the same, untimed.
    """
    if dtype == torch.float32:  # without tensor cores
        return dict(ROWS=64, COLUMNS=64, INNER=32), dict(num_warps=8, num_stages=2)
    inner = 32 if channels % 64 else 64
    rows = 64 if backward and channels <= 96 else 128
    return dict(ROWS=rows, COLUMNS=128, INNER=inner), dict(num_warps=4 if backward else 8, num_stages=3)


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    """A matrix in tiles. TMA needs it to begin at a multiple of 16 bytes; in a flat buffer a parameter may not."""
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()
    return TensorDescriptor.from_tensor(tensor, list(block))


def hidden(
    x_MC: Tensor, w1: Tensor, b1: Tensor, slope_MN: Tensor | None, out_MN: Tensor, plan: Plan | None = None
) -> None:
    """Write GELU(x w1^T + b1), and GELU' of the same unless slope is None. plan: other tiles than `_plan`'s."""
    (M, C), N = x_MC.shape, len(w1)
    sizes, options = plan or _plan(C, False, x_MC.dtype)
    rows, columns, inner = sizes.values()
    grid = min(2 * programs(x_MC.device), blocks(M, rows) * blocks(N, columns))
    slope, out = (None if z is None else _tiles(z, rows, columns // 2) for z in (slope_MN, out_MN))
    x, w = _tiles(x_MC, rows, inner), _tiles(w1, columns, inner)
    _mlp_forward[(grid,)](x, w, b1, slope, out, M, N, C, **sizes, **options)


def hidden_gradient(dy_MC: Tensor, w2: Tensor, slope_MN: Tensor, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """(dy w2) * slope, and its sums over the rows of each tile [tiles, N] in float32.

    plan: other tiles than `_plan`'s.
    """
    (M, C), N = dy_MC.shape, w2.shape[1]
    sizes, options = plan or _plan(C, True, dy_MC.dtype)
    rows, columns, inner = sizes.values()
    out_MN, sums = torch.empty_like(slope_MN), dy_MC.new_empty(blocks(M, rows), N, dtype=torch.float32)
    x, w = _tiles(dy_MC, rows, inner), _tiles(w2, inner, columns)
    slope, out = _tiles(slope_MN, rows, columns), _tiles(out_MN, rows, columns)
    _mlp_backward[(len(sums) * blocks(N, columns),)](x, w, slope, out, sums, N, C, **sizes, **options)
    return out_MN, sums


@operator("mlp")
def mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, train: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(x w1^T + b1) w2^T + b2: x [..., C], w1 [hidden, C], b1 [hidden], w2 [C, hidden], b2 [C], all of one dtype.

    Returns y [..., C] and, for the backward pass, the hidden layer after the GELU and GELU' of it before, both
    [..., hidden]. Only y is differentiable. Without `train` the other two are empty.
    """
    x_MC = x.reshape(-1, x.shape[-1]).contiguous()
    a_MN = x_MC.new_empty(len(x_MC), len(w1))
    slope_MN = torch.empty_like(a_MN) if train else None
    hidden(x_MC, w1.contiguous(), b1, slope_MN, a_MN)
    y = F.linear(a_MN, w2, b2).view(x.shape)
    if not train:
        return y, x.new_empty(0), x.new_empty(0)
    return y, a_MN.view(*x.shape[:-1], -1), slope_MN.view(*x.shape[:-1], -1)


@mlp.register_fake
def _(x, w1, b1, w2, b2, train=True):
    hidden = (*x.shape[:-1], len(w1)) if train else (0,)
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden)


@operator("mlp_backward")
def mlp_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, a: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1 and w2; that of b1 as sums over some rows each, [any, hidden] float32.

    They are added outside the operator, where torch.compile makes a faster reduction than PyTorch's.
    """
    x_MC, dy_MC = (z.reshape(-1, x.shape[-1]).contiguous() for z in (x, dy))
    dh_MN, sums = hidden_gradient(dy_MC, w2.contiguous(), slope.view(-1, len(w1)))
    dw2 = dy_MC.T @ a.view(dh_MN.shape)
    return (dh_MN @ w1).view(x.shape), dh_MN.T @ x_MC, sums, dw2


@mlp_backward.register_fake
def _(dy, x, w1, w2, a, slope):
    sizes, _ = _plan(x.shape[-1], True, dy.dtype)
    sums = x.new_empty(blocks(x.numel() // x.shape[-1], sizes["ROWS"]), len(w1), dtype=torch.float32)
    return x.new_empty(x.shape), w1.new_empty(w1.shape), sums, w2.new_empty(w2.shape)


def _keep(ctx, inputs, output) -> None:
    x, w1, _, w2, b2, _ = inputs
    _, a, slope = output
    ctx.biased = b2 is not None
    ctx.mark_non_differentiable(a, slope)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for a and slope
    ctx.save_for_backward(x, w1, w2, a, slope)


def _differentiate(ctx, dy, da, dslope):
    dy = dy.contiguous()
    x, w1, w2, a, slope = ctx.saved_tensors
    dx, dw1, sums, dw2 = mlp_backward(dy, x, w1, w2, a, slope)
    db1 = sums.sum(0).to(w1.dtype)
    return dx, dw1, db1, dw2, dy.flatten(0, -2).sum(0) if ctx.biased else None, None


mlp.register_autograd(_differentiate, setup_context=_keep)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: the stages of CAT-B, in bfloat16, and the first in float32."""
    found = []
    for channels, dtype in ((96, "bf16"), (192, "bf16"), (384, "bf16"), (768, "bf16"), (96, "fp32")):
        for what in ("inference", "forward", "backward"):
            backward = what == "backward"
            types = dict(bf16=torch.bfloat16, fp32=torch.float32)
            sizes, options = _plan(channels, backward, types[dtype])
            rows, columns, inner = sizes.values()
            constants = dict(N=4 * channels, K=channels, **sizes)
            constants |= dict(slope=None) if what == "inference" else {}
            constants |= {} if backward else dict(DELAY=0)
            tiles = dict(x=(rows, inner), w=(inner, columns) if backward else (columns, inner))
            tiles |= dict.fromkeys(("slope", "out"), (rows, columns if backward else columns // 2))
            signature = {name: f"tensordesc<{dtype}[{a}, {b}]>" for name, (a, b) in tiles.items()}
            signature |= dict(sums_ptr="*fp32") if backward else dict(bias_ptr=f"*{dtype}", M="i32:16")
            signature |= dict.fromkeys(constants, "constexpr")
            name = f"mlp {what}, {channels} channels{', float32' * (dtype == 'fp32')}"
            kernel = _mlp_backward if backward else _mlp_forward
            found.append(dict(name=name, fn=kernel, signature=signature, constexprs=constants, **options))
    return found
