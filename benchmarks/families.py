"""All models compared with the figures of their papers, and one of each family with timm's models of about its cost."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import catmodel
from benchmarks.measure import interleave, summary

# (model, image size, and from its paper: millions of parameters, GMACs, top-1 in percent). CoTNet's two accuracies are
# those of the default recipe with EMA and of the advanced recipe. None: the paper does not state the figure.
PUBLISHED: tuple[tuple[str, int, float | None, float | None, str | None], ...] = (
    ("cat_nano", 32, None, None, None),
    ("cat_tiny", 224, 17, 2.8, "80.3"),
    ("cat_small", 224, 37, 5.9, "81.8"),
    ("cat_base", 224, 52, 8.9, "82.8"),
    ("pvt_tiny", 224, 13.2, 1.9, "75.1"),
    ("pvt_small", 224, 24.5, 3.8, "79.8"),
    ("pvt_medium", 224, 44.2, 6.7, "81.2"),
    ("pvt_large", 224, 61.4, 9.8, "81.7"),
    ("cotnet50", 224, 22.2, 3.3, "79.8 / 81.3"),
    ("cotnet101", 224, 38.3, 6.1, "80.9 / 82.8"),
    ("cotnext50", 224, 30.1, 4.3, "80.2 / 82.1"),
    ("cotnext101", 224, 53.4, 8.2, "81.3 / 83.2"),
    ("se_cotnetd50", 224, 23.1, 4.1, "80.5 / 81.6"),
    ("se_cotnetd101", 224, 40.9, 8.5, "81.4 / 83.2"),
    ("se_cotnetd152", 256, 55.8, 17.0, "– / 84.0"),
    ("se_cotnetd152", 320, 55.8, 26.5, "– / 84.6"),
)
PAPER = ("paper_parameters", "paper_gmacs", "paper_top1")
# timm's models with about the same GMACs at 224 x 224: Swin-T 4.5, PVTv2-B2 4.0, DeiT-S 4.6, ResNet-50 4.1.
PEERS = {
    "cat_tiny": ("swin_tiny_patch4_window7_224",),
    "pvt_small": ("pvt_v2_b2", "deit_small_patch16_224"),
    "cotnet50": ("resnet50",),
}


def count_models() -> list[dict[str, Any]]:
    """Per entry of PUBLISHED: model, size, parameters, gmacs, and the PAPER figures (paper_parameters in millions).

    gmacs: multiply-adds of convolutions and matrix products, as counted by PyTorch, without norms and CoT's
    aggregation.
    """
    return [{**counted(name, size), **dict(zip(PAPER, paper, strict=True))} for name, size, *paper in PUBLISHED]


def counted(name: str, size: int) -> dict[str, Any]:
    """Parameters and GMACs of a model for images of size x size pixels."""
    with torch.device("meta"):
        model = catmodel.create_model(name, img_size=size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model": name, "size": size, "parameters": parameters, "gmacs": counter.get_total_flops() / 2e9}


def time_models(batch: int, steps: int, rounds: int) -> dict[str, dict[str, dict]]:
    """Model → "inference" or "training" → `summary` of the images/s of the model and its PEERS relative to the model.

    On the CPU in fp32. A training step is forward, backward and SGD.
    """
    import timm

    results: dict[str, dict[str, dict]] = {}
    for name, peers in PEERS.items():
        models = {name: catmodel.create_model(name), **{peer: timm.create_model(peer) for peer in peers}}
        for mode in ("inference", "training"):
            ways = {way: runner(model, batch, steps, mode == "training") for way, model in models.items()}
            results.setdefault(name, {})[mode] = summary(
                interleave(ways, batch * steps, rounds, time.perf_counter), name
            )
    return results


def runner(model: nn.Module, batch: int, steps: int, training: bool) -> Callable[[], None]:
    """A function that runs `steps` steps of one batch of random images."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        model.train(training)
        with torch.set_grad_enabled(training):
            for _ in range(steps):
                loss = F.cross_entropy(model(images), labels)
                if training:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

    return run
