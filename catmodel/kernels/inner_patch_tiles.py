"""Parts of the kernels of inner-patch attention: a patch's tokens on the map, its weights, and sums over its tokens.

For names and letters see `catmodel.kernels.inner_patch`.
"""

import triton
import triton.language as tl


@triton.jit
def place(patch, height, width, SIZE: tl.constexpr):
    """The image of a patch, and row and column of its first token on the map (with a shift, on the rolled map)."""
    columns = width // SIZE
    row = patch // columns
    return row // (height // SIZE), row % (height // SIZE) * SIZE, patch % columns * SIZE


@triton.jit
def token_indices(p, top, left, height, width, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """The index in its image of each token p of a patch."""
    y = top + p // SIZE + SHIFT
    x = left + p % SIZE + SHIFT
    if SHIFT > 0:
        y = tl.where(y >= height, y - height, y)
        x = tl.where(x >= width, x - width, x)
    return y * width + x


@triton.jit
def region(p, top, left, height, width, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """The regions of `Patches.shift_mask`: only tokens of the same region attend to each other."""
    y = top + p // SIZE
    x = left + p % SIZE
    row = (y >= height - SIZE).to(tl.int32) + (y >= height - SHIFT).to(tl.int32)
    return row * 3 + (x >= width - SIZE).to(tl.int32) + (x >= width - SHIFT).to(tl.int32)


@triton.jit
def attention_weights(
    q, k, bias, query, key, top, left, height, width, SIZE: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr
):
    """softmax(q k^T / sqrt(D) + bias), fp32 [QUERIES, KEYS]. The bias of padding keys is -inf."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (D**-0.5) + bias
    if SHIFT > 0:
        of_query = region(query, top, left, height, width, SIZE, SHIFT)
        of_key = region(key, top, left, height, width, SIZE, SHIFT)
        # Rows of padding attend to all keys, so that every row has a finite logit.
        allowed = (of_query[:, None] == of_key[None, :]) | (query >= SIZE * SIZE)[:, None]
        logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights * (1 / tl.sum(weights, axis=1))[:, None]


@triton.jit
def load_bias(bias_ptr, head, query, key, P: tl.constexpr):
    inside = (query < P)[:, None] & (key < P)[None, :]
    bias = tl.load(bias_ptr + (head * P + query[:, None]) * P + key[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((key < P)[None, :], bias, float("-inf"))


@triton.jit
def add_rows(sums, x):
    """sums [16, DIM] + the sum of x's rows, in each row.

    It is a product with ones, which needs fewer instructions and registers than shuffles.
    """
    return tl.dot(tl.full((16, x.shape[0]), 1.0, x.dtype), x, sums, input_precision="ieee")
