"""The MLP's matrix products with the exact GELU, or its derivative, in their epilogues.

Elements moved per token, for C channels and 4C hidden channels:

                 PyTorch                                               these kernels
    inference    fc1 5C, GELU 8C, fc2 5C                       = 18C   5C + 5C                           = 10C
    forward      the same                                      = 18C   fc1 with GELU and GELU' 9C, fc2 5C = 14C
    backward     dA 5C, GELU' 12C, dW1 5C, dW2 5C, dx 5C,              dA times GELU' 9C, others 15C     = 24C
                 db1 4C                                        = 36C

Instead of the hidden layer before the GELU, forward stores GELU' of it: the backward pass then only multiplies. The
gradient of the second bias is left to whoever adds it, if there is none here.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from catmodel.kernels.gelu import gelu, gelu_and_slope
from catmodel.kernels.launch import operator


@triton.jit
def _product(
    x,  # descriptor of [M, K], in tiles [ROWS, INNER]
    w,  # forward of [N, K] in [COLUMNS, INNER], backward of [K, N] in [INNER, COLUMNS]
    bias_ptr,  # [N]; forward only
    slope,  # of [M, N] in [ROWS, COLUMNS]: GELU'; written forward unless it is None, read backward
    out,  # as slope: GELU forward, the gradient of the hidden layer backward
    sums_ptr,  # [tiles of M, N] float32: `out` summed over each tile's rows; written backward
    N: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of GELU(x w^T + bias) or, backward, (x w) * GELU'. Consecutive tiles share rows: x stays in the L2."""
    tile = tl.program_id(0)
    row, start = tile // tl.cdiv(N, COLUMNS) * ROWS, tile % tl.cdiv(N, COLUMNS) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    exact: tl.constexpr = out.dtype == tl.float32
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, INNER):
        w_tile = w.load([k, start]) if BACKWARD else w.load([start, k]).T
        total = tl.dot(x.load([row, k]), w_tile, total, input_precision="ieee")
    if BACKWARD:
        result = (total * slope.load([row, start]).to(tl.float32)).to(out.dtype)  # 0 in rows beyond M
        sums = tile // tl.cdiv(N, COLUMNS) * N + column
        tl.store(sums_ptr + sums, _over_rows(result), column < N)
    else:
        h = total + tl.load(bias_ptr + column, column < N, 0.0).to(tl.float32)[None, :]
        if slope is not None:
            value, derivative = gelu_and_slope(h, exact)
            slope.store([row, start], derivative.to(out.dtype))
        else:
            value = gelu(h, exact)
        result = value.to(out.dtype)
    out.store([row, start], result)


@triton.jit
def _over_rows(tile):
    """[rows, columns] -> [columns] float32. 16-bit numbers are multiplied by ones: tensor cores need no shuffles."""
    if tile.dtype == tl.float32:
        sums = tl.sum(tile, 0)
    else:
        ones = tl.full((tile.shape[0], 16), 1.0, tl.float32).to(tile.dtype)
        sums = tl.sum(tl.dot(tl.trans(tile), ones), 1) * 0.0625
    return sums


def _plan(channels: int, backward: bool, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles, and launch options."""
    if dtype == torch.float32:  # without tensor cores
        return dict(ROWS=64, COLUMNS=64, INNER=32), dict(num_warps=8, num_stages=2)
    return dict(ROWS=128, COLUMNS=128, INNER=32 if channels % 64 else 64), dict(num_warps=8, num_stages=3)


def _launch(x_MK: Tensor, w: Tensor, bias: Tensor | None, slope_MN: Tensor | None, out_MN: Tensor) -> Tensor | None:
    """Forward (with a bias) w is [N, K]; backward it is [K, N], and the result is the sum of `out_MN` over rows [N]."""
    (M, K), N, backward = x_MK.shape, out_MN.shape[1], bias is None
    sizes, options = _plan(min(K, N), backward, x_MK.dtype)
    rows, columns, inner = sizes.values()
    x = TensorDescriptor.from_tensor(x_MK, [rows, inner])
    w = TensorDescriptor.from_tensor(w, [inner, columns] if backward else [columns, inner])
    slope = None if slope_MN is None else TensorDescriptor.from_tensor(slope_MN, [rows, columns])
    out = TensorDescriptor.from_tensor(out_MN, [rows, columns])
    tiles = triton.cdiv(M, rows)
    sums = torch.empty(tiles, N, dtype=torch.float32, device=x_MK.device) if backward else None
    _product[(tiles * triton.cdiv(N, columns),)](x, w, bias, slope, out, sums, N, K, backward, **sizes, **options)
    return sums.sum(0) if backward else None


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
    _launch(x_MC, w1.contiguous(), b1, slope_MN, a_MN)
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
    """Gradients of x, w1, b1 and w2."""
    x_MC, dy_MC = (z.reshape(-1, x.shape[-1]).contiguous() for z in (x, dy))
    dh_MN = a.new_empty(len(x_MC), len(w1))
    db1 = _launch(dy_MC, w2.contiguous(), None, slope.view(dh_MN.shape), dh_MN)
    dw2 = dy_MC.T @ a.view(dh_MN.shape)
    return (dh_MN @ w1).view(x.shape), dh_MN.T @ x_MC, db1.to(x.dtype), dw2


@mlp_backward.register_fake
def _(dy, x, w1, w2, a, slope):
    return x.new_empty(x.shape), w1.new_empty(w1.shape), w1.new_empty(len(w1)), w2.new_empty(w2.shape)


def _keep(ctx, inputs, output) -> None:
    x, w1, _, w2, b2, _ = inputs
    _, a, slope = output
    ctx.biased = b2 is not None
    ctx.mark_non_differentiable(a, slope)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for a and slope
    ctx.save_for_backward(x, w1, w2, a, slope)


def _backward(ctx, dy, da, dslope):
    dy = dy.contiguous()
    dx, dw1, db1, dw2 = mlp_backward(dy, *ctx.saved_tensors)
    return dx, dw1, db1, dw2, dy.flatten(0, -2).sum(0) if ctx.biased else None, None


mlp.register_autograd(_backward, setup_context=_keep)


def cases() -> list[dict]:
    """Cases for `catmodel.kernels.report`: the stages of CAT-B, in bfloat16, and the first in float32."""
    found = []
    for channels, dtype in ((96, "bf16"), (192, "bf16"), (384, "bf16"), (768, "bf16"), (96, "fp32")):
        for what in ("inference", "forward", "backward"):
            backward = what == "backward"
            sizes, options = _plan(channels, backward, torch.float32 if dtype == "fp32" else torch.bfloat16)
            rows, columns, inner = sizes.values()
            constants = dict(N=4 * channels, K=channels, BACKWARD=backward, **sizes)
            # As in a launch by Triton, arguments that are None are constants.
            constants |= dict(bias_ptr=None) if backward else dict(sums_ptr=None)
            constants |= dict(slope=None) if what == "inference" else {}
            tiles = dict(x=(rows, inner), w=(inner, columns) if backward else (columns, inner))
            tiles |= dict(slope=(rows, columns), out=(rows, columns))
            signature = {name: f"tensordesc<{dtype}[{a}, {b}]>" for name, (a, b) in tiles.items()}
            signature |= dict(bias_ptr=f"*{dtype}", sums_ptr="*fp32") | dict.fromkeys(constants, "constexpr")
            name = f"mlp {what}, {channels} channels{', float32' * (dtype == 'fp32')}"
            found.append(dict(name=name, fn=_product, signature=signature, constexprs=constants, **options))
    return found
