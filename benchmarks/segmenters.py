"""Semantic FPN on the papers' backbones, compared with their figures; and its training step with a classifier's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import catmodel
from benchmarks.dense import compare_with_classifier, count, training_step
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
TIMED = ("cat_tiny", "pvt_tiny", "cotnet50")


def count_segmenters() -> list[dict[str, Any]]:
    """Per entry of PUBLISHED: model, parameters, gflops and the PAPER figures."""
    return [{**counted(name), **dict(zip(PAPER, paper, strict=True))} for name, *paper in PUBLISHED]


def counted(name: str) -> dict[str, Any]:
    """The model, and its `dense.count` for one image of SIZE x SIZE pixels."""
    return {"model": name, **count(lambda: catmodel.create_segmenter(name, CLASSES), (SIZE, SIZE))}


def compare_steps(batch: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Model → "classifier" and "segmenter" → `dense.compare_with_classifier`."""
    results = {}
    for name in TIMED:
        ways = {
            "classifier": training_step(catmodel.create_model(name), batch, loss),
            "segmenter": training_step(catmodel.create_segmenter(name, CLASSES), batch, loss),
        }
        results[name] = compare_with_classifier(ways, batch, rounds)
    return results


def loss(logits: Tensor) -> Tensor:
    """Of a classifier's logits [B, classes], or of a segmenter's [B, classes, h, w] enlarged to the image."""
    if logits.ndim == 4:
        logits = upsample(logits, 4).permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
