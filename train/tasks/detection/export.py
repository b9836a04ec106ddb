"""A trained detector as launch/export.py writes it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import catmodel
from train.tasks.dense import backbone_of

if TYPE_CHECKING:
    from train.tasks.detection.task import Detection


def exported(task: "Detection", state: dict[str, Tensor], features: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The detector with the weights `state`, and a description of it; features: its backbone in its place, which gives
    the maps of all stages.
    """
    settings, task_settings, config = task.model_settings(), task.config.task, task.config
    about: dict[str, Any] = {
        "classes": list(task.classes),
        "mean": list(config.augment.mean),
        "std": list(config.augment.std),
        "interpolation": config.data.interpolation,
        "bgr": task_settings.bgr,
        "scale": list(task_settings.scale_of_tests),
    }
    if features:
        model, settings, state = backbone_of(config, settings, state)
    else:
        model = catmodel.create_detector(**settings)
        keys = ("score_threshold", "before_nms", "nms", "detections")
        about["detect"] = {key: getattr(task_settings, key) for key in keys}
    model.load_state_dict(state)
    return model.eval(), {"model": settings, **about}
