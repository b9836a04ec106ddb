"""Blocks in a row: residual sums that are made by the next norm, drop-path, and recomputed activations."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from catmodel import create_model, kernels
from catmodel.layers import Block, DropPathAdd, Pending, draw_block_scales, draw_scales


class Scale(nn.Module):
    """In place of attention: a linear layer with a bias that can be left to the caller, and with drop-path or not."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, channels)

    def late_bias(self) -> Tensor:
        return self.proj.bias

    def can_scale(self, factor: float, scales: bool) -> bool:
        return scales

    def forward(
        self, x: Tensor, factor: float, scales: bool, last_bias: bool = True, scale: Tensor | None = None
    ) -> Tensor:
        x = x * factor if scale is None else x * factor * scale[:, None, None]
        return self.proj(x) if last_bias else nn.functional.linear(x, self.proj.weight)


@pytest.fixture
def interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.register()


def blocks(drop_path: float = 0.5) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(16, Scale(16), 4, drop_path) for _ in range(2)).train()


def run(made: nn.ModuleList, x: Tensor, scales: bool = False, **options: bool) -> list[Tensor]:
    """The result of the blocks in a row, and the gradients of x and of all parameters."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    pending = Pending(x)
    for block, factors in zip(made, draw_block_scales(made, x), strict=True):
        pending = block.chain(pending, factors, 2.0, scales, **options)
    y = pending.total()
    inputs = [x, *made.parameters()]
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)]


@pytest.mark.parametrize("drop_path, scales", [(0.0, False), (0.0, True), (0.5, False), (0.5, True)])
def test_blocks_in_a_row_are_the_same_with_kernels(interpreted, drop_path, scales):
    made, x = blocks(drop_path), torch.randn(6, 5, 16)
    for value, expected in zip(run(made, x, scales, fused=True), run(made, x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_recomputed_activations_give_the_same_bits(interpreted, fused):
    made, x = blocks(), torch.randn(6, 5, 16)
    for value, expected in zip(run(made, x, fused=fused, recompute=True), run(made, x, fused=fused), strict=True):
        assert torch.equal(value, expected)


def test_without_kernels_a_row_is_the_blocks_one_after_the_other():
    made, x = blocks(), torch.randn(6, 5, 16)
    torch.manual_seed(1)
    y = x
    for block, scales in zip(made, draw_block_scales(made, x), strict=True):
        y = block(y, scales, 2.0, False)
    assert torch.equal(run(made, x)[0], y.detach())


def test_autocast_leaves_sums_and_norms_to_pytorch(interpreted):
    """A norm then computes in float32 from tokens of float32 and branches of bfloat16."""
    made, x = blocks(0.0), torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = run(made, x, fused=True), run(made, x)
    for value, expected in zip(fused, plain, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)


def test_a_sample_is_kept_and_scaled_or_dropped():
    torch.manual_seed(2)
    add, x, branch = DropPathAdd(0.25).train(), torch.ones(400, 3), torch.full((400, 3), 3.0)
    found = add(x, branch, *draw_scales([add], x))
    assert set(found.flatten().tolist()) == {1.0, 5.0} and (found == found[:, :1]).all()
    assert 0.65 < (found[:, 0] == 5).float().mean() < 0.85
    assert draw_scales([add.eval()], x) == [None] and torch.equal(add(x, branch, None), x + branch)


def test_one_draw_serves_many_sums():
    """Each sum has its own rate and draws, and those that drop nothing have none."""
    torch.manual_seed(3)
    sums, x = [DropPathAdd(rate).train() for rate in (0.0, 0.5, 0.5, 0.1)], torch.ones(4000, 2)
    with CountCalls("aten::rand") as counted:
        nothing, one, other, rare = draw_scales(sums, x)
    assert counted.calls == 1 and nothing is None
    for scale, rate in ((one, 0.5), (other, 0.5), (rare, 0.1)):
        assert set(scale.tolist()) == {0.0, (1 / torch.tensor(1 - rate)).item()}
        assert abs((scale == 0).float().mean().item() - rate) < 0.03
    assert 0.4 < (one == other).float().mean() < 0.6


@pytest.mark.parametrize(("name", "side", "stages"), [("cat_nano", 32, 2), ("pvt_tiny", 64, 4), ("cotnet50", 64, 4)])
def test_a_stage_draws_once(name, side, stages):
    """The first stage of cat_nano, a single block, drops nothing."""
    model = create_model(name, img_size=side, num_classes=3, drop_path_rate=0.3).train()
    with CountCalls("aten::rand") as counted:
        model(torch.randn(2, 3, side, side))
    assert counted.calls == stages


class CountCalls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.calls += function.name() == self.name
        return function(*arguments, **(named or {}))
