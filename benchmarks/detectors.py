"""RetinaNet, FCOS and ATSS on the papers' backbones, compared with their figures; and their training steps."""

from typing import Any

from torch import Tensor

import catmodel
from benchmarks.dense import compare_with_classifier, count, training_step
from catmodel.detection.kinds import KINDS

CLASSES, SIZE = 80, (800, 1280)  # COCO's classes; the image size of the papers' FLOPs, height and width
# (detector, backbone, image size, parameters of the released configuration, GFLOPs and AP on COCO of the paper's table,
# whether those GFLOPs include attention's products). None: not there. PVT's code keeps the class token's position in
# its last stage, which no map uses: 512 parameters more than ours.
PUBLISHED: tuple[tuple[str, str, tuple[int, int], int | None, float | None, str | None, bool], ...] = (
    ("retinanet", "cat_small", SIZE, 47_464_702, 276, "40.1", False),
    ("retinanet", "cat_base", SIZE, 61_702_366, 337, "41.4", False),
    ("fcos", "cat_small", SIZE, 44_740_452, 245, "40.0", False),
    ("fcos", "cat_base", SIZE, 58_978_116, 303, "41.0", False),
    ("atss", "cat_small", SIZE, 44_740_452, 243, "42.0", False),
    ("atss", "cat_base", SIZE, 58_978_116, 303, "42.5", False),
    ("retinanet", "pvt_tiny", SIZE, 22_964_724, None, "36.7, 3x: 39.4", False),
    ("retinanet", "pvt_small", SIZE, 34_221_300, 285.8, "40.4, 3x: 42.2", True),
    ("retinanet", "pvt_small", (640, 960), 34_221_300, 157.2, "38.7", True),
    ("retinanet", "pvt_medium", SIZE, 53_943_540, None, "41.9, 3x: 43.2", False),
    ("retinanet", "pvt_large", SIZE, 71_104_756, None, "42.6, 3x: 43.4", False),
    ("retinanet", "cotnet50", SIZE, None, None, None, False),
)
PAPER = ("paper_parameters", "paper_gflops", "paper_ap", "paper_counts_attention")
TIMED = ("cat_tiny", "pvt_tiny", "cotnet50")


def count_detectors() -> list[dict[str, Any]]:
    """Per entry of PUBLISHED: detector, model, size, parameters, gflops, attention and the PAPER figures."""
    return [
        {**counted(kind, name, size), **dict(zip(PAPER, paper, strict=True))} for kind, name, size, *paper in PUBLISHED
    ]


def counted(kind: str, name: str, size: tuple[int, int]) -> dict[str, Any]:
    """The detector, the model, the size, and its `dense.count` for one image of that size."""
    counts = count(lambda: catmodel.create_detector(kind, name, CLASSES), size)
    return {"detector": kind, "model": name, "size": list(size), **counts}


def compare_steps(batch: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Model → "classifier" and each detector → `dense.compare_with_classifier`."""
    results = {}
    for name in TIMED:
        ways = {"classifier": training_step(catmodel.create_model(name), batch, loss)}
        for kind in KINDS:
            ways[kind] = training_step(catmodel.create_detector(kind, name, CLASSES), batch, loss)
        results[name] = compare_with_classifier(ways, batch, rounds)
    return results


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The networks are compared, not their losses."""
    return sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
