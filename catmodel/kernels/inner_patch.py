"""Inner-patch attention (`catmodel.attention.InnerPatchAttention`) between its two linear layers, forward and backward.

The kernels address a patch's tokens in the map as stored, row by row: no map is cut, pasted or rolled. A program
processes one head. It holds the head's position bias in registers, loops over the patches with a fixed stride, and in
the backward pass sums the gradients of both biases in fp32; PyTorch then adds the programs' sums in a fixed order. The
attention weights are recomputed in the backward pass.

For the shape letters see `catmodel.attention`. P tokens are padded to QUERIES rows and KEYS columns, D channels of a
head to DIM. Patches of more than 64 tokens are processed in blocks of QUERIES queries against all keys; backward, one
block after the other.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.dropout import threshold
from catmodel.kernels.dropout import keep_mask
from catmodel.kernels.inner_patch_tiles import add_rows, attention_weights, load_bias, place, token_indices
from catmodel.kernels.launch import blocks, launch, operator, padded, programs

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _inner_patch_forward(
    qkv_ptr,
    bias_ptr,
    seed_ptr,
    scale_ptr,  # [B]: of each image's output, or None
    y_ptr,
    patches,
    height,
    width,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (heads, blocks of queries, any number of programs)."""
    P: tl.constexpr = SIZE * SIZE
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    C = heads * D
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, DIM)
    query_mask = (query < P)[:, None] & (channel < D)[None, :]
    key_mask = (key < P)[:, None] & (channel < D)[None, :]
    bias = load_bias(bias_ptr, head, query, key, P)
    if RATE > 0:
        seed = tl.load(seed_ptr)

    for patch in range(tl.program_id(2), patches, tl.num_programs(2)):
        image, top, left = place(patch, height, width, SIZE)
        first = image.to(tl.int64) * height * width
        query_token = token_indices(query, top, left, height, width, SIZE, SHIFT)
        key_token = token_indices(key, top, left, height, width, SIZE, SHIFT)
        head_ptr = qkv_ptr + first * 3 * C + head * D
        at_key = key_token[:, None] * (3 * C) + channel[None, :]
        q = tl.load(head_ptr + query_token[:, None] * (3 * C) + channel[None, :], mask=query_mask, other=0.0)
        k = tl.load(head_ptr + C + at_key, mask=key_mask, other=0.0)
        v = tl.load(head_ptr + 2 * C + at_key, mask=key_mask, other=0.0)

        weights = attention_weights(q, k, bias, query, key, top, left, height, width, SIZE, SHIFT, D)
        if RATE > 0:
            keep = keep_mask(seed, (patch * heads + head) * P + query, key, THRESHOLD)
            weights = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
        y = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + image).to(tl.float32)
        tl.store(
            y_ptr + first * C + head * D + query_token[:, None] * C + channel[None, :], y.to(v.dtype), mask=query_mask
        )


@triton.jit
def _inner_patch_backward(
    dy_ptr,
    qkv_ptr,
    bias_ptr,
    seed_ptr,
    scale_ptr,
    dqkv_ptr,
    dkv_ptr,
    dbias_ptr,
    sums_ptr,
    patches,
    height,
    width,
    block,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (heads, slots), for one block of queries.

    dq is written to dqkv. So are dk and dv with a single block, for which dkv is None; otherwise dkv is an fp32 buffer
    [B, N, 2C], to which all blocks but the first ADD. dbias: fp32 [slots, h, all queries, KEYS]. sums: fp32 [blocks,
    slots, 3, h, D], those of dq, dk and dv over a program's tokens, or None.
    """
    P: tl.constexpr = SIZE * SIZE
    SCALE: tl.constexpr = D**-0.5
    DKV: tl.constexpr = 3 if dkv_ptr is None else 2  # length of a row with dk and dv, in C
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    C = heads * D
    if dkv_ptr is None:
        dk_ptr = dqkv_ptr + C
    else:
        dk_ptr = dkv_ptr
    dv_ptr = dk_ptr + C
    query = block * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, DIM)
    query_mask = (query < P)[:, None] & (channel < D)[None, :]
    key_mask = (key < P)[:, None] & (channel < D)[None, :]
    bias = load_bias(bias_ptr, head, query, key, P)
    dbias = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    q_sums = tl.zeros((16, DIM), dtype=tl.float32)
    k_sums = tl.zeros((16, DIM), dtype=tl.float32)
    v_sums = tl.zeros((16, DIM), dtype=tl.float32)
    if RATE > 0:
        seed = tl.load(seed_ptr)

    for patch in range(tl.program_id(1), patches, tl.num_programs(1)):
        image, top, left = place(patch, height, width, SIZE)
        first = image.to(tl.int64) * height * width
        query_token = token_indices(query, top, left, height, width, SIZE, SHIFT)
        key_token = token_indices(key, top, left, height, width, SIZE, SHIFT)
        head_ptr = qkv_ptr + first * 3 * C + head * D
        at_query = query_token[:, None] * (3 * C) + channel[None, :]
        at_key = key_token[:, None] * (3 * C) + channel[None, :]
        q = tl.load(head_ptr + at_query, mask=query_mask, other=0.0)
        k = tl.load(head_ptr + C + at_key, mask=key_mask, other=0.0)
        v = tl.load(head_ptr + 2 * C + at_key, mask=key_mask, other=0.0)
        dy_at = dy_ptr + first * C + head * D + query_token[:, None] * C + channel[None, :]
        dy = tl.load(dy_at, mask=query_mask, other=0.0)

        weights = attention_weights(q, k, bias, query, key, top, left, height, width, SIZE, SHIFT, D)
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dropped = weights
        if RATE > 0:
            keep = keep_mask(seed, (patch * heads + head) * P + query, key, THRESHOLD)
            dropped = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
            dweights = tl.where(keep, dweights * (1 / (1 - RATE)), 0.0)
        # All gradients are linear in dy, so an image's factor multiplies them instead.
        scale = 1.0 if scale_ptr is None else tl.load(scale_ptr + image).to(tl.float32)
        # Each gradient is stored as soon as it is complete, to free its registers.
        to_key = first * DKV * C + head * D
        at_dkey = key_token[:, None] * (DKV * C) + channel[None, :]
        dv = tl.dot(tl.trans(dropped.to(dy.dtype)), dy, input_precision="ieee") * scale
        if sums_ptr is not None:
            v_sums = add_rows(v_sums, dv.to(q.dtype))
        if ADD:
            dv += tl.load(dv_ptr + to_key + at_dkey, mask=key_mask, other=0.0)
        tl.store(dv_ptr + to_key + at_dkey, dv.to(dv_ptr.dtype.element_ty), mask=key_mask)

        dlogits = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
        dbias += dlogits * scale
        dlogits = dlogits.to(q.dtype)
        dq = (tl.dot(dlogits, k, input_precision="ieee") * (scale * SCALE)).to(q.dtype)
        if sums_ptr is not None:
            q_sums = add_rows(q_sums, dq)
        tl.store(dqkv_ptr + first * 3 * C + head * D + at_query, dq, mask=query_mask)
        dk = tl.dot(tl.trans(dlogits), q, input_precision="ieee") * (scale * SCALE)
        if sums_ptr is not None:
            k_sums = add_rows(k_sums, dk.to(q.dtype))
        if ADD:
            dk += tl.load(dk_ptr + to_key + at_dkey, mask=key_mask, other=0.0)
        tl.store(dk_ptr + to_key + at_dkey, dk.to(dk_ptr.dtype.element_ty), mask=key_mask)

    # The whole tile is stored, because its addresses are simpler and occupy no registers during the loop.
    slot = tl.program_id(1) * heads + head
    row = slot * tl.cdiv(P, QUERIES) * QUERIES + query
    tl.store(dbias_ptr + row[:, None] * KEYS + key[None, :], dbias)
    if sums_ptr is not None:
        sums_ptr += (block * tl.num_programs(1) + tl.program_id(1)) * 3 * C + head * D + channel
        tl.store(sums_ptr, tl.sum(q_sums, 0) * 0.0625, channel < D)  # all 16 rows are the same
        tl.store(sums_ptr + C, tl.sum(k_sums, 0) * 0.0625, channel < D)
        tl.store(sums_ptr + 2 * C, tl.sum(v_sums, 0) * 0.0625, channel < D)


# ------------------------------------------------------------------------------------------------------------ operators


@operator("inner_patch_attention", visible=True)
def inner_patch_attention(
    qkv_BNF: Tensor,
    qkv_bias: Tensor | None,
    bias_hPP: Tensor,
    height: int,
    width: int,
    size: int,
    shift: int,
    rate: float,
    seed: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Queries, keys and values [B, N, 3C] of a map's tokens, row by row, and position bias [h, P, P] -> [B, N, C].

    qkv_bias: [3C], which qkv includes. The backward pass sums its gradient on the way, so it must be detached before;
        None: the backward pass leaves that sum to the operator that added the bias.
    height, width: sides of the map, multiples of `size`, the side of a patch.
    shift: tokens by which the map is rolled up and to the left before it is divided into patches. Tokens that become
        neighbours only by the roll do not attend to each other.
    rate, seed: dropout of the attention weights, whose rows are numbered by image, patch, head and query
        (`catmodel.dropout`).
    scale: factors of the images' results [B]; None: all are 1.
    """
    qkv_BNF = qkv_BNF.contiguous()
    B, N, F = qkv_BNF.shape
    h = len(bias_hPP)
    y_BNC = qkv_BNF.new_empty(B, N, F // 3)
    patches = B * N // size**2
    constants, options = _plan(size, F // 3 // h, shift, rate, qkv_BNF.dtype)
    steps = _steps(constants)
    slots = _slots(patches, h * steps, FORWARD_WARPS // options["num_warps"], qkv_BNF.device)
    arguments = qkv_BNF, bias_hPP.contiguous(), seed, scale, y_BNC, patches, height, width
    launch(_inner_patch_forward, (h, steps, slots), *arguments, **constants, **options)
    return y_BNC


@inner_patch_attention.register_fake
def _(qkv_BNF, qkv_bias, bias_hPP, height, width, size, shift, rate, seed, scale):
    B, N, F = qkv_BNF.shape
    return qkv_BNF.new_empty(B, N, F // 3)


@operator("inner_patch_attention_backward", visible=True)
def inner_patch_attention_backward(
    dy_BNC: Tensor,
    qkv_BNF: Tensor,
    qkv_bias: Tensor | None,
    bias_hPP: Tensor,
    height: int,
    width: int,
    size: int,
    shift: int,
    rate: float,
    seed: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `qkv_BNF`, `qkv_bias` (empty if it is None) and `bias_hPP`, each in its dtype."""
    dy_BNC, qkv_BNF = dy_BNC.contiguous(), qkv_BNF.contiguous()
    B, N, F = qkv_BNF.shape
    C = F // 3
    h, P, _ = bias_hPP.shape
    patches = B * N // P
    constants, options = _plan(size, C // h, shift, rate, qkv_BNF.dtype)
    steps = _steps(constants)
    slots = _slots(patches, h, BACKWARD_WARPS // options["num_warps"], qkv_BNF.device)
    dqkv_BNF = torch.empty_like(qkv_BNF)
    dbias_shQK = bias_hPP.new_empty(slots, h, steps * constants["QUERIES"], constants["KEYS"], dtype=torch.float32)
    sums = None if qkv_bias is None else bias_hPP.new_empty(steps * slots, 3 * C, dtype=torch.float32)
    dkv = None if steps == 1 else qkv_BNF.new_empty(B, N, 2 * C, dtype=torch.float32)
    tensors = dy_BNC, qkv_BNF, bias_hPP.contiguous(), seed, scale, dqkv_BNF, dkv, dbias_shQK, sums
    for block in range(steps):
        numbers = patches, height, width, block
        launch(_inner_patch_backward, (h, slots), *tensors, *numbers, **constants, ADD=block > 0, **options)
    if dkv is not None:
        dqkv_BNF[..., C:] = dkv
    of_qkv = dqkv_BNF.new_empty(0) if sums is None else sums.sum(0).to(qkv_bias.dtype)
    return dqkv_BNF, of_qkv, dbias_shQK[..., :P, :P].sum(0).to(bias_hPP.dtype)


@inner_patch_attention_backward.register_fake
def _(dy_BNC, qkv_BNF, qkv_bias, bias_hPP, height, width, size, shift, rate, seed, scale):
    inputs = qkv_BNF, qkv_BNF.new_empty(0) if qkv_bias is None else qkv_bias, bias_hPP
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save(ctx, inputs, output):
    qkv_BNF, qkv_bias, bias_hPP, *ctx.settings, seed, scale = inputs
    ctx.save_for_backward(qkv_BNF, qkv_bias, bias_hPP, seed, scale)


def _differentiate(ctx, dy_BNC):
    *tensors, seed, scale = ctx.saved_tensors
    dqkv_BNF, of_qkv, dbias_hPP = inner_patch_attention_backward(dy_BNC, *tensors, *ctx.settings, seed, scale)
    of_qkv = None if tensors[1] is None else of_qkv
    return dqkv_BNF, of_qkv, dbias_hPP, None, None, None, None, None, None, None


inner_patch_attention.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- launch parameters

# Warps per multiprocessor: about as many as its registers hold.
FORWARD_WARPS, BACKWARD_WARPS = 16, 8


@functools.cache
def _plan(size: int, d: int, shift: int, rate: float, dtype: torch.dtype) -> tuple[dict, dict]:
    """Constants and launch options of both kernels, chosen so that their tiles stay in registers."""
    P = size**2
    constants = dict(
        SIZE=size,
        SHIFT=shift,
        D=d,
        RATE=rate,
        THRESHOLD=threshold(rate),
        QUERIES=padded(P) if P <= 64 else 16,
        KEYS=padded(P),
        DIM=padded(d),
    )
    # fp32 products do not use tensor cores, and take more registers.
    wide = dtype == torch.float32
    warps = constants["KEYS"] // 16 * (2 if wide else 1)
    return constants, dict(num_warps=min(warps, 8), num_stages=1 if wide else 2)


def _steps(constants: dict) -> int:  # blocks of queries
    return blocks(constants["SIZE"] ** 2, constants["QUERIES"])


def _slots(patches: int, programs_each: int, per_multiprocessor: int, device: torch.device) -> int:
    """Programs per head: enough to fill the device. Depends on shapes and device only, as does the order of sums."""
    return min(patches, max(per_multiprocessor * programs(device) // programs_each, 1))


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`, in bfloat16: stage 1 of CAT-B, with dropout too; patches of 12 x 12."""
    types = dict.fromkeys(("dy_ptr", "qkv_ptr", "scale_ptr", "y_ptr", "dqkv_ptr"), "*bf16")
    types |= dict.fromkeys(("bias_ptr", "dkv_ptr", "dbias_ptr", "sums_ptr"), "*fp32") | dict(seed_ptr="*i32")
    types |= dict.fromkeys(("patches", "height", "width", "block"), "i32")
    found = []
    for what, size, rate in (("", 7, 0.0), (", dropout", 7, 0.1), (", 12 x 12", 12, 0.0)):
        constants, options = _plan(size, 32, 0, rate, torch.bfloat16)
        # As in a launch by Triton, None is a constant.
        backward = dict(ADD=False, dkv_ptr=None) if _steps(constants) == 1 else dict(ADD=True)
        for name, kernel, more in (
            ("forward", _inner_patch_forward, {}),
            ("backward", _inner_patch_backward, backward),
        ):
            constexprs = constants | more
            signature = {each: "constexpr" if each in constexprs else types[each] for each in kernel.arg_names}
            case = dict(fn=kernel, signature=signature, constexprs=constexprs, **options)
            found.append(dict(name=f"inner-patch {name}{what}", **case))
    return found
