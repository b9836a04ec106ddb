"""The config's `task` section for detection, and what it demands of the other sections. Without torch."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import Fraction
from train.config_sections import Positive, TaskConfig, refuse_settings_of_classification

if TYPE_CHECKING:
    from train.config import Config

Sides = tuple[Positive, Positive]
# The backbones' smallest map has 1/32 of an image's sides.
Divisor = Annotated[int, Field(ge=32, multiple_of=32)]

GROUPS = 32  # of the group norms in FCOS's and ATSS's heads


class Settings(TaskConfig):
    """A scale is (long side, short side): an image is resized, its aspect kept, to fit into it."""

    evaluation_keys = ("task.test_scale", "task.score_threshold", "task.before_nms", "task.nms", "task.detections")

    detector: Literal["retinanet", "fcos", "atss"] = Field("retinanet", description="the head, its targets and losses")
    scales: tuple[Sides, ...] = Field(
        ((1333, 800),), min_length=1, description="(long, short) sides of training images; one is drawn for each image"
    )
    scale_mode: Literal["value", "range"] = Field(
        "value", description="value: one of scales; range: any short side from their smallest to their largest"
    )
    crop_scales: tuple[Sides, ...] | None = Field(
        None,
        min_length=1,
        description="each image with probability 0.5 is resized to one of these and cropped before it is resized to "
        "one of scales",
    )
    crop_range: tuple[Positive, Positive] = Field(
        (384, 600), description="with crop_scales: smallest and largest side of the crop, in pixels"
    )
    test_scale: Sides | None = Field(
        None, description="as scales, in evaluation and prediction; null: the largest of scales"
    )
    divisor: Divisor = Field(
        32, description="images are padded to sides that are multiples; a coarser one gives fewer shapes"
    )
    aspect_groups: bool = Field(True, description="no micro-batch has both wide and tall images")
    neck_channels: Positive = Field(256, description="channels of the feature pyramid")
    head_channels: Positive = Field(256, description="channels of the head")
    head_convs: Positive = Field(4, description="convolutions of each of the head's towers")
    anchor_scale: float | None = Field(
        None,
        gt=0,
        description="side of the smallest anchor of a level / the level's stride; null: as published, 4 (retinanet), "
        "8 (atss)",
    )
    frozen_stages: int = Field(0, ge=0, description="stages of the backbone, from the first, that are not trained")
    bgr: bool = Field(
        False, description="the network's input is blue, green, red; augment.mean and augment.std stay red, green, blue"
    )
    score_threshold: Fraction = Field(0.05, description="detections with lower scores are left out")
    before_nms: Positive = Field(1000, description="detections of a level, the best ones, that are given to NMS")
    nms: float | None = Field(
        None,
        gt=0,
        le=1,
        description="IoU threshold of NMS, which is done by class; null: as published, 0.5 (retinanet, fcos), 0.6 "
        "(atss)",
    )
    detections: Positive = Field(100, description="detections of an image, at most")

    @field_validator("scales", "crop_scales", "test_scale")
    @classmethod
    def _long_side_first(cls, value: tuple | None) -> tuple | None:
        """task.scales, task.crop_scales and task.test_scale have the long side first."""
        scales = () if value is None else value if isinstance(value[0], tuple) else (value,)
        for long, short in scales:
            if long < short:
                raise ValueError(f"a scale of task is (long side, short side), not {[long, short]}")
        return value

    @field_validator("crop_range")
    @classmethod
    def _is_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        """task.crop_range has the smaller number first."""
        if value[0] > value[1]:
            raise ValueError(f"task.crop_range {list(value)} is no range: give the smaller number first")
        return value

    @model_validator(mode="after")
    def _scales_fit(self) -> "Settings":
        """task.scale_mode=range takes two or more of task.scales, of one long side; task.crop_range belongs to
        task.crop_scales.
        """
        if self.scale_mode == "range":
            if len(self.scales) < 2:
                raise ValueError("task.scale_mode=range needs two of task.scales: the smallest and the largest")
            if len({long for long, _ in self.scales}) > 1:
                raise ValueError(
                    "task.scale_mode=range draws the short side alone: give all of task.scales one long side"
                )
        if self.crop_scales is None and self.crop_range != type(self).model_fields["crop_range"].default:
            raise ValueError("task.crop_range belongs to task.crop_scales, which is not set")
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> "Settings":
        """task.anchor_scale belongs to retinanet and atss; task.head_channels of fcos and atss are a multiple of 32,
        at least 64."""
        if self.detector == "fcos" and self.anchor_scale is not None:
            raise ValueError("task.anchor_scale belongs to task.detector=retinanet and atss: fcos has no anchors")
        if self.detector != "retinanet" and (self.head_channels % GROUPS or self.head_channels == GROUPS):
            raise ValueError(
                f"task.head_channels {self.head_channels} of {self.detector} must be a multiple of {GROUPS}, and more: "
                "group norms in as many groups need two values or more in each, also on a map of one pixel"
            )
        return self

    @property
    def scale_of_tests(self) -> tuple[int, int]:
        """task.test_scale, or the largest of task.scales."""
        return self.test_scale or max(self.scales)


def check_config(config: "Config") -> None:
    """Raise ValueError if a setting of another section does not go with detection."""
    refuse_settings_of_classification(config, "task.scales and task.crop_scales")
    if config.task.aspect_groups and (config.data.shuffle != "full" or config.data.repeats != 1):
        raise ValueError(
            "micro-batches of one orientation need data.shuffle=full and data.repeats=1: set them, or "
            "task.aspect_groups=false"
        )
    if config.task.frozen_stages and config.zero.stage == 3:
        raise ValueError(
            "task.frozen_stages needs zero.stage 0, 1 or 2: at stage 3 all weights are divided, to be trained"
        )
    if config.task.frozen_stages and not config.model.init_from:
        raise ValueError("task.frozen_stages keeps first weights as they are: name a file of them in model.init_from")
