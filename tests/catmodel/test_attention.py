"""IPSA and CPSA against loops that follow the paper's equations, and the layout of patches."""

import math

import pytest
import torch
from torch import Tensor

from catmodel.attention import CrossPatchAttention, InnerPatchAttention, attend
from catmodel.patches import Patches


def softmax(row: Tensor) -> Tensor:
    e = (row - row.max()).exp()
    return e / e.sum()


def reference_ipsa(attn: InnerPatchAttention, x: Tensor, size: int) -> Tensor:
    """x [H, W, C], an image whose sides may need padding. Loops over patches, heads and tokens."""
    H, W, C = x.shape
    d = C // attn.num_heads
    padded = torch.zeros(-(-H // size) * size, -(-W // size) * size, C, dtype=x.dtype)
    padded[:H, :W] = x
    out = torch.zeros_like(padded)
    for top in range(0, padded.shape[0], size):
        for left in range(0, padded.shape[1], size):
            places = [(i, j) for i in range(size) for j in range(size)]
            qkv = [attn.qkv.weight @ padded[top + i, left + j] + attn.qkv.bias for i, j in places]
            for a, (ia, ja) in enumerate(places):
                heads = []
                for h in range(attn.num_heads):
                    q = qkv[a][h * d : (h + 1) * d]
                    logits = []
                    for b, (ib, jb) in enumerate(places):
                        k = qkv[b][C + h * d : C + (h + 1) * d]
                        bias = attn.relative_position_bias_table[
                            (ia - ib + size - 1) * (2 * size - 1) + ja - jb + size - 1, h
                        ]
                        logits.append(q @ k / math.sqrt(d) + bias)
                    weights = softmax(torch.stack(logits))
                    heads.append(
                        sum(weights[b] * qkv[b][2 * C + h * d : 2 * C + (h + 1) * d] for b in range(len(places)))
                    )
                out[top + ia, left + ja] = attn.proj.weight @ torch.cat(heads) + attn.proj.bias
    return out[:H, :W]


def reference_cpsa(attn: CrossPatchAttention, x: Tensor, size: int) -> Tensor:
    """x [H, W, C], an image whose sides may need padding. Loops over channels and patches."""
    H, W, C = x.shape
    padded = torch.zeros(-(-H // size) * size, -(-W // size) * size, C, dtype=x.dtype)
    padded[:H, :W] = x
    out = torch.zeros_like(padded)
    corners = [(top, left) for top in range(0, padded.shape[0], size) for left in range(0, padded.shape[1], size)]
    F, d = size**2, size**2 // attn.num_heads
    for c in range(C):
        qkv = [
            attn.qkv.weight @ padded[t : t + size, le : le + size, c].reshape(-1) + attn.qkv.bias for t, le in corners
        ]
        for a, (top, left) in enumerate(corners):
            heads = []
            for h in range(attn.num_heads):
                part = slice(h * d, (h + 1) * d)
                weights = softmax(
                    torch.stack([qkv[a][:F][part] @ other[F : 2 * F][part] / math.sqrt(d) for other in qkv])
                )
                heads.append(sum(w * other[2 * F :][part] for w, other in zip(weights, qkv, strict=True)))
            out[top : top + size, left : left + size, c] = (attn.proj.weight @ torch.cat(heads) + attn.proj.bias).view(
                size, size
            )
    return out[:H, :W]


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


MAPS = [(4, 2), (2, 6), (2, 2), (5, 3), (1, 7)]  # for patches of 2 x 2; the last two need padding


@pytest.mark.parametrize("map_size", MAPS)
@pytest.mark.parametrize("kind", ["ipsa", "cpsa", "cpsa with 2 heads"])
def test_equals_the_reference_in_value_and_gradient(kind: str, map_size: tuple[int, int]):
    channels, size = 4, 2
    attn = randomise(
        InnerPatchAttention(channels, 2, size) if kind == "ipsa" else CrossPatchAttention(size, 2 if "2" in kind else 1)
    )
    reference = reference_ipsa if kind == "ipsa" else reference_cpsa
    x = torch.randn(2, *map_size, channels, dtype=torch.double, requires_grad=True)
    patches = Patches(*map_size, size)

    ours = patches.map_from_tokens(attn(patches.tokens_from_map(x), patches))
    theirs = torch.stack([reference(attn, image, size) for image in x])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    inputs = [x, *attn.parameters()]
    direction = torch.randn_like(ours)
    ours_grad = torch.autograd.grad((ours * direction).sum(), inputs)
    theirs_grad = torch.autograd.grad((theirs * direction).sum(), inputs)
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_plain_and_fused_attention_agree(tokens: int, with_bias: bool):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, tokens, 5, dtype=torch.double) for _ in range(3))
    bias = torch.randn(2, tokens, tokens, dtype=torch.double) if with_bias else None
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, bias), fused, rtol=0, atol=1e-13)


@pytest.mark.parametrize("map_size", [(6, 9), (7, 5), (3, 3), (2, 1)])
@pytest.mark.parametrize("shift", [0, 1])
def test_join_undoes_split(map_size: tuple[int, int], shift: int):
    patches = Patches(*map_size, size=3)
    x = torch.randn(2, *map_size, 4)
    tokens = patches.tokens_from_map(x)
    assert torch.equal(patches.map_from_tokens(tokens), x)
    assert torch.equal(patches.join(patches.split(tokens, shift), shift), tokens)


def test_whole_patches_are_split_and_joined_without_a_copy():
    patches = Patches(6, 9, size=3)
    tokens = patches.tokens_from_map(torch.randn(2, 6, 9, 4))
    split = patches.split(tokens)
    assert split.shape == (2, 6, 9, 4)
    assert split.data_ptr() == tokens.data_ptr() == patches.join(split).data_ptr()


@pytest.mark.parametrize("map_size", [(6, 6), (5, 7)])
def test_shifted_patches_mix_exactly_the_tokens_of_a_shifted_grid(map_size: tuple[int, int]):
    """Compares the inputs on which each token's output depends with a shifted grid."""
    H, W = map_size
    size, shift = 3, 1
    attn = randomise(InnerPatchAttention(4, 1, size, shifted=True))
    assert attn.shift == shift
    patches = Patches(H, W, size)

    def run(x: Tensor) -> Tensor:
        return patches.map_from_tokens(attn(patches.tokens_from_map(x), patches))

    x = torch.randn(1, H, W, 4, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x).sum(-1), x)[0, :, :, 0].abs().sum(-1)  # [H, W, H, W]

    def cell(i: int, j: int) -> tuple[int, int]:
        return (i + size - shift) // size, (j + size - shift) // size

    for i in range(H):
        for j in range(W):
            for k in range(H):
                for m in range(W):
                    assert (jacobian[i, j, k, m] > 0) == (cell(i, j) == cell(k, m)), (i, j, k, m)


def test_shift_leaves_a_single_patch_alone():
    attn = randomise(InnerPatchAttention(4, 1, 3, shifted=True))
    plain = randomise(InnerPatchAttention(4, 1, 3))
    plain.load_state_dict(attn.state_dict())
    x, patches = torch.randn(1, 9, 4, dtype=torch.double), Patches(3, 3, 3)
    assert torch.equal(attn(x, patches), plain(x, patches))


def test_cpsa_dropout_with_one_patch_zeroes_whole_channels():
    attn = randomise(CrossPatchAttention(2, dropout=0.5)).train()
    patches = Patches(2, 2, 2)
    x = torch.randn(64, 4, 3, dtype=torch.double)
    silent = attn.proj.bias.view(1, 4, 1).expand(64, 4, 3)
    kept = attn.proj(2.0 * (x.transpose(1, 2) @ attn.qkv.weight[8:].T + attn.qkv.bias[8:])).transpose(1, 2)
    torch.manual_seed(1)
    y = attn(x, patches)
    dropped = (y - silent).abs().amax(1) < 1e-12
    torch.testing.assert_close(y, torch.where(dropped[:, None], silent, kept), rtol=0, atol=1e-12)
    assert 0.35 < dropped.double().mean() < 0.65
    assert (dropped.any(1) & ~dropped.all(1)).any(), "channels of one image must be drawn independently"


@pytest.mark.parametrize("side", [2, 4, 10])  # 1, 4 and 25 patches
def test_cpsa_dropout_acts_in_training_only_and_keeps_the_mean(side: int):
    attn = randomise(CrossPatchAttention(2, dropout=0.2))
    patches = Patches(side, side, 2)
    x = torch.randn(1, side * side, 2, dtype=torch.double).expand(4000 // side, -1, -1)
    expected = attn(x[:1], patches)
    assert torch.equal(expected, attn(x[:1], patches))
    attn.train()
    torch.manual_seed(0)
    first = attn(x, patches)
    torch.manual_seed(0)
    assert torch.equal(first, attn(x, patches))
    assert not torch.equal(first, attn(x, patches))
    error = (first.mean(0) - expected[0]).abs().max() / first.std(0).max()
    assert error < 5 / math.sqrt(len(x))


def test_indivisible_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads 3 does not divide the 8 channels"):
        InnerPatchAttention(8, 3, 2)
    with pytest.raises(ValueError, match="cpsa_num_heads 2 does not divide the 49"):
        CrossPatchAttention(7, 2)
