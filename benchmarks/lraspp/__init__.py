"""Semantic segmentation by torchvision's lraspp_mobilenet_v3_large, trained from scratch by this program.

To compare with: everything but the network is the task `segmentation`'s. The `model` section of the config is not used.
"""

from train.tasks.segmentation import Settings, report_sections

__all__ = ["Settings", "load", "report_sections"]


def load() -> type:
    from benchmarks.lraspp.task import LRASPPSegmentation

    return LRASPPSegmentation
