"""Self-attention of any number of tokens, forward and backward, without a tokens x tokens matrix in memory.

The algorithm is FlashAttention-2 (arXiv 2307.08691). Forward, blocks of queries meet blocks of keys with a running
softmax. Backward, starting from the saved log-sum-exp, one kernel computes dq (and the sums of dy * y that it needs),
another dk and dv; each program alone writes its rows. Differences from PyTorch's fused attention: the mask of
`catmodel.dropout`, and heads of any width, such as 49 channels, which PyTorch pads by copying.

Letters: n tokens, h heads of d channels, padded to DIM. Matrices of attention weights are [M queries, N keys].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.dropout import threshold
from catmodel.kernels.dropout import keep_mask
from catmodel.kernels.launch import operator, padded

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
def _head(sequence, n, h: tl.constexpr, D: tl.constexpr):
    """Offsets of a head in q (k and v follow after h * D and 2 h * D), in y, and in the sums per query."""
    batch = (sequence // h).to(tl.int64)
    return batch * n * (3 * h * D) + sequence % h * D, batch * n * (h * D) + sequence % h * D, sequence.to(tl.int64) * n


@triton.jit
def _forward(
    qkv_ptr,  # [batch, n, 3, h, d]
    seed_ptr,
    y_ptr,  # [batch, n, h, d]
    lse_ptr,  # [batch, h, n] float32, base 2
    n,
    h: tl.constexpr,
    D: tl.constexpr,
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
    at_q, at_y, at_sums = _head(sequence, n, h, D)
    q_ptr = qkv_ptr + at_q
    q = _load(q_ptr, queries, n, 3 * h * D, D, DIM)

    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    y = tl.zeros((M, DIM), tl.float32)
    for start in range(0, n, N):
        keys = start + tl.arange(0, N)
        logits = _logits(q, _load(q_ptr + h * D, keys, n, 3 * h * D, D, DIM), keys, n, D)
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, axis=1)
        highest = new_highest
        v = _load(q_ptr + 2 * h * D, keys, n, 3 * h * D, D, DIM)
        weights = _drop(weights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        y = tl.dot(weights.to(v.dtype), v, y * rescale[:, None], input_precision="ieee")

    _store(y_ptr + at_y, y / total[:, None], queries, n, h * D, D, DIM)
    tl.store(lse_ptr + at_sums + queries, highest + tl.log2(total), mask=queries < n)


@triton.jit
def _backward_q(
    dy_ptr,
    qkv_ptr,
    seed_ptr,
    y_ptr,
    lse_ptr,
    delta_ptr,  # [batch, h, n] float32: sums of dy * y, written
    dqkv_ptr,  # as qkv; dq is written
    n,
    h: tl.constexpr,
    D: tl.constexpr,
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
    at_q, at_y, at_sums = _head(sequence, n, h, D)
    q_ptr = qkv_ptr + at_q
    q = _load(q_ptr, queries, n, 3 * h * D, D, DIM)
    dy = _load(dy_ptr + at_y, queries, n, h * D, D, DIM)
    delta = tl.sum(dy.to(tl.float32) * _load(y_ptr + at_y, queries, n, h * D, D, DIM).to(tl.float32), axis=1)
    tl.store(delta_ptr + at_sums + queries, delta, mask=queries < n)
    lse = tl.load(lse_ptr + at_sums + queries, mask=queries < n, other=0.0)

    dq = tl.zeros((M, DIM), tl.float32)
    for start in range(0, n, N):
        keys = start + tl.arange(0, N)
        k = _load(q_ptr + h * D, keys, n, 3 * h * D, D, DIM)
        v = _load(q_ptr + 2 * h * D, keys, n, 3 * h * D, D, DIM)
        weights = tl.exp2(_logits(q, k, keys, n, D) - lse[:, None])
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dweights = _drop(dweights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dlogits = weights * (dweights - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
    _store(dqkv_ptr + at_q, dq * D**-0.5, queries, n, 3 * h * D, D, DIM)


@triton.jit
def _backward_kv(
    dy_ptr,
    qkv_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    n,
    h: tl.constexpr,
    D: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program per head and (fastest) block of keys."""
    blocks = tl.cdiv(n, N)
    sequence = tl.program_id(0) // blocks
    keys = tl.program_id(0) % blocks * N + tl.arange(0, N)
    at_q, at_y, at_sums = _head(sequence, n, h, D)
    q_ptr = qkv_ptr + at_q
    k = _load(q_ptr + h * D, keys, n, 3 * h * D, D, DIM)
    v = _load(q_ptr + 2 * h * D, keys, n, 3 * h * D, D, DIM)

    dk = tl.zeros((N, DIM), tl.float32)
    dv = tl.zeros((N, DIM), tl.float32)
    for start in range(0, n, M):
        queries = start + tl.arange(0, M)
        q = _load(q_ptr, queries, n, 3 * h * D, D, DIM)
        dy = _load(dy_ptr + at_y, queries, n, h * D, D, DIM)  # zero beyond n queries, which then add nothing
        lse = tl.load(lse_ptr + at_sums + queries, mask=queries < n, other=0.0)
        delta = tl.load(delta_ptr + at_sums + queries, mask=queries < n, other=0.0)
        weights = tl.exp2(_logits(q, k, keys, n, D) - lse[:, None])
        dropped = _drop(weights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dv = tl.dot(tl.trans(dropped.to(dy.dtype)), dy, dv, input_precision="ieee")
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dweights = _drop(dweights, seed_ptr, sequence, queries, keys, n, RATE, THRESHOLD)
        dlogits = weights * (dweights - delta[:, None])
        dk = tl.dot(tl.trans(dlogits.to(q.dtype)), q, dk, input_precision="ieee")
    _store(dqkv_ptr + at_q + h * D, dk * D**-0.5, keys, n, 3 * h * D, D, DIM)
    _store(dqkv_ptr + at_q + 2 * h * D, dv, keys, n, 3 * h * D, D, DIM)


# ------------------------------------------------------------------------------------------------------------ operators


@operator("flash_attention")
def flash_attention(qkv_Tn3hd: Tensor, rate: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v for T sequences of n tokens, in h heads of d <= 256: [T, n, 3, h, d] -> [T, n, h, d].

    Also returns, for the backward pass, the log-sum-exp (base 2) of each query's logits, float32 [T, h, n].

    rate, seed: dropout of the attention weights, whose rows are numbered by sequence, head and query
    (`catmodel.dropout`).
    """
    qkv_Tn3hd = qkv_Tn3hd.contiguous()
    T, n, _, h, d = qkv_Tn3hd.shape
    y_Tnhd, lse_Thn = _new_outputs(qkv_Tn3hd, rate, seed)
    constants, options = _plan(h, d, rate, qkv_Tn3hd.dtype)
    _forward[(T * h * triton.cdiv(n, constants["M"]),)](qkv_Tn3hd, seed, y_Tnhd, lse_Thn, n, **constants, **options)
    return y_Tnhd, lse_Thn


@flash_attention.register_fake
def _new_outputs(qkv_Tn3hd, rate, seed):
    T, n, _, h, d = qkv_Tn3hd.shape
    return qkv_Tn3hd.new_empty(T, n, h, d), qkv_Tn3hd.new_empty(T, h, n, dtype=torch.float32)


@operator("flash_attention_backward")
def flash_attention_backward(
    dy_Tnhd: Tensor, qkv_Tn3hd: Tensor, y_Tnhd: Tensor, lse_Thn: Tensor, rate: float, seed: Tensor | None
) -> Tensor:
    """The gradient of `qkv_Tn3hd`."""
    dy_Tnhd, qkv_Tn3hd = dy_Tnhd.contiguous(), qkv_Tn3hd.contiguous()
    T, n, _, h, d = qkv_Tn3hd.shape
    dqkv_Tn3hd, delta_Thn = torch.empty_like(qkv_Tn3hd), torch.empty_like(lse_Thn)
    constants, options = _plan(h, d, rate, qkv_Tn3hd.dtype)
    grid = (T * h * triton.cdiv(n, constants["M"]),)
    _backward_q[grid](dy_Tnhd, qkv_Tn3hd, seed, y_Tnhd, lse_Thn, delta_Thn, dqkv_Tn3hd, n, **constants, **options)
    grid = (T * h * triton.cdiv(n, constants["N"]),)
    _backward_kv[grid](dy_Tnhd, qkv_Tn3hd, seed, lse_Thn, delta_Thn, dqkv_Tn3hd, n, **constants, **options)
    return dqkv_Tn3hd


@flash_attention_backward.register_fake
def _(dy_Tnhd, qkv_Tn3hd, y_Tnhd, lse_Thn, rate, seed):
    return torch.empty_like(qkv_Tn3hd, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    qkv_Tn3hd, ctx.rate, seed = inputs
    ctx.save_for_backward(qkv_Tn3hd, *output, seed)


def _differentiate(ctx, dy_Tnhd, _):
    *saved, seed = ctx.saved_tensors
    return torch.ops.catmodel.flash_attention_backward(dy_Tnhd, *saved, ctx.rate, seed), None, None


flash_attention.register_autograd(_differentiate, setup_context=_save)


def _plan(h: int, d: int, rate: float, dtype: torch.dtype) -> tuple[dict, dict]:
    """Constants and launch options of all three kernels."""
    dim = padded(d)
    # Tiles of 64 x 64 fit into registers, except for long rows or float32.
    block = 64 if dim <= 64 and dtype != torch.float32 else 32
    constants = dict(h=h, D=d, RATE=rate, THRESHOLD=threshold(rate), DIM=dim, M=block, N=block)
    # One stage: rows of 49 bfloat16 numbers are not aligned to the 4 bytes that asynchronous copies need, and more
    # stages spill registers.
    return constants, dict(num_warps=4 if dim <= 64 else 8, num_stages=1)


def cases() -> list[dict]:
    """Cases for `catmodel.kernels.report`: CPSA of a dense 800 x 1280 image, in bfloat16."""
    constants, options = _plan(1, 49, 0.2, torch.bfloat16)
    return [
        dict(
            name=f"flash attention, {name}",
            fn=kernel,
            signature=dict.fromkeys(tensors, "*bf16")
            | dict.fromkeys(sums, "*fp32")
            | dict(seed_ptr="*i32", n="i32")
            | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            **options,
        )
        for name, kernel, tensors, sums in (
            ("forward", _forward, ("qkv_ptr", "y_ptr"), ("lse_ptr",)),
            ("backward of q", _backward_q, ("dy_ptr", "qkv_ptr", "y_ptr", "dqkv_ptr"), ("lse_ptr", "delta_ptr")),
            ("backward of k and v", _backward_kv, ("dy_ptr", "qkv_ptr", "dqkv_ptr"), ("lse_ptr", "delta_ptr")),
        )
    ]
