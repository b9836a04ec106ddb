"""One-stage detectors: RetinaNet, FCOS and ATSS."""

from catmodel.detection.detector import Detector, create_detector
from catmodel.detection.grid import Grid
from catmodel.detection.postprocess import detect, detect_one

__all__ = ["Detector", "Grid", "create_detector", "detect", "detect_one"]
