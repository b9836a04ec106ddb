"""Every architecture of `catmodel`, small enough for a CPU: one block per stage, and few channels if configurable."""

import torch
from torch import nn

import catmodel

SMALL_PVT = dict(img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4))

# One model of each architecture. The others differ from one of these in depths, widths and numbers of heads only.
ARCHITECTURES = ("cat_nano", "cat_tiny", "pvt_tiny", "cotnet50", "cotnext50", "se_cotnetd50", "se_cotnetd152")


def settings(name: str, stages: int = 4) -> dict:
    """Overrides for a small model without drop-path and dropout, for images of 64 pixels (cat_nano: 32)."""
    if name == "cat_nano":
        return dict(depths=(1, 1, 1)[:stages], num_heads=(2, 4, 8)[:stages])
    few = dict(depths=(1,) * stages, num_classes=10, img_size=64)
    if name.startswith("cat"):
        return dict(
            few, embed_dim=32, num_heads=(2, 4, 8, 16)[:stages], patch_size=2, drop_path_rate=0.0, cpsa_drop=0.0
        )
    if name.startswith("pvt"):
        per_stage = dict(embed_dims=(16, 32, 40, 64), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4))
        cut = {key: values[:stages] for key, values in per_stage.items()}
        return dict(few, drop_path_rate=0.0, sr_ratios=(8, 4, 2, 1)[-stages:], **cut)
    return dict(few, width=0.25, **({"stem_width": 16} if name.startswith("se") else {}))


def small(name: str, stages: int = 4, **overrides) -> nn.Module:
    torch.manual_seed(0)
    return catmodel.create_model(name, **{**settings(name, stages), **overrides})


def images(name: str, count: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    side = 32 if name == "cat_nano" else 64
    return torch.randn(count, 3, *(size or (side, side)), generator=torch.Generator().manual_seed(1))


def jitter(model: nn.Module) -> nn.Module:
    """Move weights far from their initial values, where attention is nearly uniform and CoTNet's last norms 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.2)
    return model


def nano(seed: int = 0, **overrides) -> nn.Module:
    torch.manual_seed(seed)
    return catmodel.create_model("cat_nano", **overrides)


def small_pvt(seed: int = 0, **overrides) -> nn.Module:
    """A PVT whose stages differ in every setting."""
    torch.manual_seed(seed)
    return catmodel.create_model("pvt_tiny", **{**SMALL_PVT, **overrides})


def assert_loaded(model: nn.Module, published: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, published[key]), key
