"""Attention of any number of tokens, forward and backward, without a queries x keys matrix in memory.

The algorithm is FlashAttention-2 (arXiv 2307.08691). Forward, blocks of queries meet blocks of keys with a running
softmax. Backward, starting from the saved log-sum-exp, one kernel computes dq (and the sums of dy * y that it needs),
another dk and dv; each program alone writes its rows. Differences from PyTorch's fused attention: gradients are
summed in a fixed order, the mask of `catmodel.dropout`, and heads of any width, such as 49 channels, which PyTorch pads
by copying.

Letters: n queries, m keys, h heads of d channels, padded to DIM. Matrices of attention weights are [M queries, N keys].
Rows of queries are Q elements apart, those of keys K. The keys begin after SKIP elements, their values h * d later.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.dropout import threshold
from catmodel.kernels.dropout import keep_mask
from catmodel.kernels.launch import blocks, launch, operator, padded

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load(ptr, rows, n, stride: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """[rows, DIM] of one head, zero beyond n rows and D columns."""
    d = tl.arange(0, DIM)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=(rows < n)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, values, rows, n, stride: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    mask = (rows < n)[:, None] & (d < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + d[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logits(q, k, keys, n, D: tl.constexpr):
    """q k^T / sqrt(d) for exponentials of base 2; -inf for keys beyond n."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (D**-0.5 * 1.4426950408889634)
    return tl.where((keys < n)[None, :], logits, float("-inf"))


@triton.jit
def _drop(weights, seed_ptr, sequence, queries, keys, n, RATE: tl.constexpr, THRESHOLD: tl.constexpr):
    if RATE > 0:
        keep = keep_mask(tl.load(seed_ptr), sequence * n + queries, keys, THRESHOLD)
        weights = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
    return weights


@triton.jit
def _head(sequence, n, m, h: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, SKIP: tl.constexpr):
    """Offsets of a head in q, in k, in y, and in the sums per query."""
    batch, head = (sequence // h).to(tl.int64), sequence % h * D
    return batch * n * Q + head, batch * m * K + SKIP + head, batch * n * (h * D) + head, sequence.to(tl.int64) * n


@triton.jit
def _flash_forward(
    q_ptr,
    kv_ptr,
    seed_ptr,
    y_ptr,  # [batch, n, h, d]
    lse_ptr,  # [batch, h, n] float32, base 2
    n,
    m,
    h: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SKIP: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program per head and (fastest) block of queries."""
    blocks = tl.cdiv(n, M)
    sequence = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * M + tl.arange(0, M)
    at_q, at_k, at_y, at_sums = _head(sequence, n, m, h, D, Q, K, SKIP)
    k_ptr = kv_ptr + at_k
    q = _load(q_ptr + at_q, queries, n, Q, D, DIM)

    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    y = tl.zeros((M, DIM), tl.float32)
    for start in range(0, m, N):
        keys = start + tl.arange(0, N)
        logits = _logits(q, _load(k_ptr, keys, m, K, D, DIM), keys, m, D)
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, axis=1)
        highest = new_highest
        v = _load(k_ptr + h * D, keys, m, K, D, DIM)
        weights = _drop(weights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        y = tl.dot(weights.to(v.dtype), v, y * rescale[:, None], input_precision="ieee")

    _store(y_ptr + at_y, y / total[:, None], queries, n, h * D, D, DIM)
    tl.store(lse_ptr + at_sums + queries, highest + tl.log2(total), mask=queries < n)


@triton.jit
def _flash_backward_q(
    dy_ptr,
    q_ptr,
    kv_ptr,
    seed_ptr,
    y_ptr,
    lse_ptr,
    delta_ptr,  # [batch, h, n] float32: sums of dy * y, written
    dq_ptr,  # with the rows of q
    n,
    m,
    h: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SKIP: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program per head and (fastest) block of queries."""
    blocks = tl.cdiv(n, M)
    sequence = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * M + tl.arange(0, M)
    at_q, at_k, at_y, at_sums = _head(sequence, n, m, h, D, Q, K, SKIP)
    k_ptr = kv_ptr + at_k
    q = _load(q_ptr + at_q, queries, n, Q, D, DIM)
    dy = _load(dy_ptr + at_y, queries, n, h * D, D, DIM)
    delta = tl.sum(dy.to(tl.float32) * _load(y_ptr + at_y, queries, n, h * D, D, DIM).to(tl.float32), axis=1)
    tl.store(delta_ptr + at_sums + queries, delta, mask=queries < n)
    lse = tl.load(lse_ptr + at_sums + queries, mask=queries < n, other=0.0)

    dq = tl.zeros((M, DIM), tl.float32)
    for start in range(0, m, N):
        keys = start + tl.arange(0, N)
        k = _load(k_ptr, keys, m, K, D, DIM)
        v = _load(k_ptr + h * D, keys, m, K, D, DIM)
        weights = tl.exp2(_logits(q, k, keys, m, D) - lse[:, None])
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dweights = _drop(dweights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dlogits = weights * (dweights - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
    _store(dq_ptr + at_q, dq * D**-0.5, queries, n, Q, D, DIM)


@triton.jit
def _flash_backward_kv(
    dy_ptr,
    q_ptr,
    kv_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    dkv_ptr,  # with the rows of kv
    n,
    m,
    h: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SKIP: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program per head and (fastest) block of keys."""
    blocks = tl.cdiv(m, N)
    sequence = tl.program_id(0) // blocks
    keys = tl.program_id(0) % blocks * N + tl.arange(0, N)
    at_q, at_k, at_y, at_sums = _head(sequence, n, m, h, D, Q, K, SKIP)
    k = _load(kv_ptr + at_k, keys, m, K, D, DIM)
    v = _load(kv_ptr + at_k + h * D, keys, m, K, D, DIM)

    dk = tl.zeros((N, DIM), tl.float32)
    dv = tl.zeros((N, DIM), tl.float32)
    for start in range(0, n, M):
        queries = start + tl.arange(0, M)
        q = _load(q_ptr + at_q, queries, n, Q, D, DIM)
        dy = _load(dy_ptr + at_y, queries, n, h * D, D, DIM)  # zero beyond n queries, which then add nothing
        lse = tl.load(lse_ptr + at_sums + queries, mask=queries < n, other=0.0)
        delta = tl.load(delta_ptr + at_sums + queries, mask=queries < n, other=0.0)
        weights = tl.exp2(_logits(q, k, keys, m, D) - lse[:, None])
        dropped = _drop(weights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dv = tl.dot(tl.trans(dropped.to(dy.dtype)), dy, dv, input_precision="ieee")
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dweights = _drop(dweights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dlogits = weights * (dweights - delta[:, None])
        dk = tl.dot(tl.trans(dlogits.to(q.dtype)), q, dk, input_precision="ieee")
    _store(dkv_ptr + at_k, dk * D**-0.5, keys, m, K, D, DIM)
    _store(dkv_ptr + at_k + h * D, dv, keys, m, K, D, DIM)


# ------------------------------------------------------------------------------------------------------------ operators


def _launch_forward(
    q: Tensor, kv: Tensor, y_Tnhd: Tensor, lse_Thn: Tensor, m: int, rate: float, seed: Tensor | None
) -> None:
    """q [T, n, h, d], kv [T, m, 2, h, d]; or both the same tensor [T, n, 3, h, d]."""
    T, n, h, d = y_Tnhd.shape
    constants, options = _plan(h, d, q is kv, rate, q.dtype)
    grid = (T * h * blocks(n, constants["M"]),)
    launch(_flash_forward, grid, q, kv, seed, y_Tnhd, lse_Thn, n, m, **constants, **options)


def _launch_backward(
    dy_Tnhd: Tensor,
    q: Tensor,
    kv: Tensor,
    y_Tnhd: Tensor,
    lse_Thn: Tensor,
    dq: Tensor,
    dkv: Tensor,
    m: int,
    rate: float,
    seed: Tensor | None,
) -> None:
    """As `_launch_forward`; dq and dkv are as q and kv."""
    T, n, h, d = y_Tnhd.shape
    delta_Thn = torch.empty_like(lse_Thn)
    constants, options = _plan(h, d, q is kv, rate, q.dtype)
    grid = (T * h * blocks(n, constants["M"]),)
    launch(_flash_backward_q, grid, dy_Tnhd, q, kv, seed, y_Tnhd, lse_Thn, delta_Thn, dq, n, m, **constants, **options)
    grid = (T * h * blocks(m, constants["N"]),)
    launch(_flash_backward_kv, grid, dy_Tnhd, q, kv, seed, lse_Thn, delta_Thn, dkv, n, m, **constants, **options)


@operator("flash_attention", visible=True)
def flash_attention(qkv_Tn3hd: Tensor, rate: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v for T sequences of n tokens, in h heads of d <= 256: [T, n, 3, h, d] -> [T, n, h, d].

    Also returns, for the backward pass, the log-sum-exp (base 2) of each query's logits, float32 [T, h, n].

    rate, seed: dropout of the attention weights, whose rows are numbered by sequence, head and query
    (`catmodel.dropout`).
    """
    qkv_Tn3hd = qkv_Tn3hd.contiguous()
    y_Tnhd, lse_Thn = _new_outputs(qkv_Tn3hd, rate, seed)
    _launch_forward(qkv_Tn3hd, qkv_Tn3hd, y_Tnhd, lse_Thn, y_Tnhd.shape[1], rate, seed)
    return y_Tnhd, lse_Thn


@flash_attention.register_fake
def _new_outputs(qkv_Tn3hd, rate, seed):
    T, n, _, h, d = qkv_Tn3hd.shape
    return qkv_Tn3hd.new_empty(T, n, h, d), qkv_Tn3hd.new_empty(T, h, n, dtype=torch.float32)


@operator("flash_attention_backward", visible=True)
def flash_attention_backward(
    dy_Tnhd: Tensor, qkv_Tn3hd: Tensor, y_Tnhd: Tensor, lse_Thn: Tensor, rate: float, seed: Tensor | None
) -> Tensor:
    """The gradient of `qkv_Tn3hd`."""
    dy_Tnhd, qkv_Tn3hd = dy_Tnhd.contiguous(), qkv_Tn3hd.contiguous()
    dqkv_Tn3hd = torch.empty_like(qkv_Tn3hd)
    tensors = dy_Tnhd, qkv_Tn3hd, qkv_Tn3hd, y_Tnhd, lse_Thn, dqkv_Tn3hd, dqkv_Tn3hd
    _launch_backward(*tensors, y_Tnhd.shape[1], rate, seed)
    return dqkv_Tn3hd


@flash_attention_backward.register_fake
def _(dy_Tnhd, qkv_Tn3hd, y_Tnhd, lse_Thn, rate, seed):
    return torch.empty_like(qkv_Tn3hd, memory_format=torch.contiguous_format)


def _ignore(ctx, lse_Thn):
    """No gradient is computed for it, and autograd allocates no zeros in its place."""
    ctx.mark_non_differentiable(lse_Thn)
    ctx.set_materialize_grads(False)


def _save(ctx, inputs, output):
    qkv_Tn3hd, ctx.rate, seed = inputs
    _ignore(ctx, output[1])
    ctx.save_for_backward(qkv_Tn3hd, *output, seed)


def _differentiate(ctx, dy_Tnhd, _):
    *saved, seed = ctx.saved_tensors
    return flash_attention_backward(dy_Tnhd, *saved, ctx.rate, seed), None, None


flash_attention.register_autograd(_differentiate, setup_context=_save)


@operator("cross_attention", visible=True)
def cross_attention(q_Tnhd: Tensor, kv_Tm2hd: Tensor) -> tuple[Tensor, Tensor]:
    """As `flash_attention` without dropout, with keys and values of other tokens [T, m, 2, h, d] than the queries."""
    q_Tnhd, kv_Tm2hd = q_Tnhd.contiguous(), kv_Tm2hd.contiguous()
    y_Tnhd, lse_Thn = _new_cross_outputs(q_Tnhd, kv_Tm2hd)
    _launch_forward(q_Tnhd, kv_Tm2hd, y_Tnhd, lse_Thn, kv_Tm2hd.shape[1], 0.0, None)
    return y_Tnhd, lse_Thn


@cross_attention.register_fake
def _new_cross_outputs(q_Tnhd, kv_Tm2hd):
    T, n, h, d = q_Tnhd.shape
    return q_Tnhd.new_empty(T, n, h, d), q_Tnhd.new_empty(T, h, n, dtype=torch.float32)


@operator("cross_attention_backward", visible=True)
def cross_attention_backward(
    dy_Tnhd: Tensor, q_Tnhd: Tensor, kv_Tm2hd: Tensor, y_Tnhd: Tensor, lse_Thn: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `q_Tnhd` and `kv_Tm2hd`."""
    dy_Tnhd, q_Tnhd, kv_Tm2hd = dy_Tnhd.contiguous(), q_Tnhd.contiguous(), kv_Tm2hd.contiguous()
    dq_Tnhd, dkv_Tm2hd = torch.empty_like(q_Tnhd), torch.empty_like(kv_Tm2hd)
    tensors = dy_Tnhd, q_Tnhd, kv_Tm2hd, y_Tnhd, lse_Thn, dq_Tnhd, dkv_Tm2hd
    _launch_backward(*tensors, kv_Tm2hd.shape[1], 0.0, None)
    return dq_Tnhd, dkv_Tm2hd


@cross_attention_backward.register_fake
def _(dy_Tnhd, q_Tnhd, kv_Tm2hd, y_Tnhd, lse_Thn):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_Tnhd, kv_Tm2hd))


def _save_cross(ctx, inputs, output):
    _ignore(ctx, output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate_cross(ctx, dy_Tnhd, _):
    return cross_attention_backward(dy_Tnhd, *ctx.saved_tensors)


cross_attention.register_autograd(_differentiate_cross, setup_context=_save_cross)


@functools.cache
def _plan(h: int, d: int, packed: bool, rate: float, dtype: torch.dtype) -> tuple[dict, dict]:
    """Constants and launch options of all three kernels. packed: queries, keys and values are in one tensor."""
    dim = padded(d)
    # Tiles of 64 x 64 fit into registers, except for long rows or float32.
    block = 64 if dim <= 64 and dtype != torch.float32 else 32
    rows = dict(Q=3 * h * d, K=3 * h * d, SKIP=h * d) if packed else dict(Q=h * d, K=2 * h * d, SKIP=0)
    constants = dict(h=h, D=d, **rows, RATE=rate, THRESHOLD=threshold(rate), DIM=dim, M=block, N=block)
    # One stage: rows of 49 bfloat16 numbers are not aligned to the 4 bytes that asynchronous copies need, and more
    # stages spill registers.
    return constants, dict(num_warps=4 if dim <= 64 else 8, num_stages=1)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`, in bfloat16: CPSA of a dense 800 x 1280 image, and stage 1 of PVT."""
    found, of_backward = [], ("lse_ptr", "delta_ptr")
    for what, h, d, rate in (("", 1, 49, 0.2), ("cross-", 1, 64, 0.0)):
        constants, options = _plan(h, d, not what, rate, torch.bfloat16)
        for name, kernel, tensors, sums in (
            ("forward", _flash_forward, ("q_ptr", "kv_ptr", "y_ptr"), ("lse_ptr",)),
            ("backward of q", _flash_backward_q, ("dy_ptr", "q_ptr", "kv_ptr", "y_ptr", "dq_ptr"), of_backward),
            ("backward of k and v", _flash_backward_kv, ("dy_ptr", "q_ptr", "kv_ptr", "dkv_ptr"), of_backward),
        ):
            signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sums, "*fp32")
            signature |= dict(seed_ptr="*i32", n="i32", m="i32") | dict.fromkeys(constants, "constexpr")
            title = f"flash {what}attention, {name}"
            found.append(dict(name=title, fn=kernel, signature=signature, constexprs=constants, **options))
    return found
