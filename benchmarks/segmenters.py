"""Semantic FPN on the papers' backbones, compared with their figures; and its training step with a classifier's."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import catmodel
from benchmarks.measure import interleave, summary
from catmodel.fixed_order import upsample

CLASSES, SIZE = 150, 1024  # ADE20K's classes; the image size of the papers' FLOPs
# (backbone, parameters of the released configuration, GFLOPs and mIoU on ADE20K of the paper's table). None: not there.
# PVT's code keeps the class token's position in its last stage, which no map uses: 512 parameters more than ours.
PUBLISHED: tuple[tuple[str, int | None, int | None, str | None], ...] = (
    ("cat_small", 40_899_744, 214, "80k: 40.6 / 42.1, 160k: 42.2 / 42.8"),
    ("cat_base", 55_137_408, 276, "80k: 42.2 / 43.6, 160k: 43.2 / 44.9"),
    ("pvt_tiny", 16_981_398, None, "35.7, code: 36.6"),
    ("pvt_small", 28_237_974, None, "39.8, code: 41.9"),
    ("pvt_medium", 47_960_214, None, "41.6, code: 43.5"),
    ("pvt_large", 65_121_430, None, "42.1, code: 43.5"),
    ("cotnet50", None, None, None),
)
PAPER = ("paper_parameters", "paper_gflops", "paper_miou")
# The operators of convolutions and linear layers. Attention multiplies batches of matrices: bmm, which the papers' tool
# does not count.
COUNTED = ("convolution", "mm", "addmm")
TIMED = ("cat_tiny", "pvt_tiny", "cotnet50")


def count_segmenters() -> list[dict[str, Any]]:
    """Per entry of PUBLISHED: model, parameters, gflops and the PAPER figures."""
    return [{**counted(name), **dict(zip(PAPER, paper, strict=True))} for name, *paper in PUBLISHED]


def counted(name: str) -> dict[str, Any]:
    """Parameters, and "GFLOPs" as in the papers: multiply-adds of convolutions and linear layers, in 10^9, for one
    image of SIZE x SIZE pixels; and those of attention's products, which they leave out.
    """
    with torch.device("meta"):
        model = catmodel.create_segmenter(name, CLASSES).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, SIZE, SIZE))
    found = {
        str(operator).split(".")[-1]: flops / 2e9 for operator, flops in counter.get_flop_counts()["Global"].items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gflops = sum(found.get(operator, 0.0) for operator in COUNTED)
    return {"model": name, "parameters": parameters, "gflops": gflops, "attention": sum(found.values()) - gflops}


def compare_steps(batch: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Model → "classifier" and "segmenter" → `summary` of images/s, and "megabytes".

    A training step on images of 224 x 224 pixels on the CPU in fp32: forward, backward and SGD. megabytes: what
    autograd keeps, weights included, divided by the images.
    """
    results = {}
    for name in TIMED:
        ways = {
            "classifier": step(catmodel.create_model(name), batch),
            "segmenter": step(catmodel.create_segmenter(name, CLASSES), batch),
        }
        kept = {way: kept_megabytes(run) / batch for way, run in ways.items()}
        rates = summary(interleave(ways, batch, rounds, time.perf_counter), "classifier")
        results[name] = {way: {**row, "megabytes": kept[way]} for way, row in rates.items()}
    return results


def step(model: nn.Module, batch: int) -> Callable[[], None]:
    """A function that runs one training step on random images."""
    model.train()
    images = torch.randn(batch, 3, 224, 224)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        loss(model(images)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def loss(logits: Tensor) -> Tensor:
    """Of a classifier's logits [B, classes], or of a segmenter's [B, classes, h, w] enlarged to the image."""
    if logits.ndim == 4:
        logits = upsample(logits, 4).permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def kept_megabytes(run: Callable[[], None]) -> float:
    """Size of all tensors that autograd keeps in a step, in 10^6 bytes, parameters included once."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # holds it: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values()) / 1e6
