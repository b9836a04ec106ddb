"""Small detectors, whose neck and head have few channels."""

import torch

from catmodel.detection import Detector, create_detector
from tests.catmodel.small import settings


def small_detector(kind: str, name: str = "cat_tiny", classes: int = 5, **options) -> Detector:
    """options: of `create_detector`."""
    torch.manual_seed(0)
    own = {key: value for key, value in settings(name).items() if key != "num_classes"}
    return create_detector(
        kind, name, classes, **{**own, "neck_channels": 24, "head_channels": 32, "head_convs": 2, **options}
    )
