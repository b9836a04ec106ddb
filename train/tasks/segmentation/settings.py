"""The config's `task` section for segmentation, and what it demands of the other sections. Without torch."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from train.config_sections import Positive, Ratio, TaskConfig, refuse_settings_of_classification

if TYPE_CHECKING:
    from train.config import Config

# The smallest map of a backbone has 1/32 of an image's sides: two pixels, because batch norm needs more than one value.
CropSide = Annotated[int, Field(ge=64, multiple_of=32)]


class Settings(TaskConfig):
    """Sizes of two numbers are (height, width), but `scale` and `test_scale` are (long side, short side)."""

    evaluation_keys = (
        *("task.test_scale", "task.divisor", "task.test", "task.window", "task.stride"),
        *("task.test_ratios", "task.test_flip"),
    )

    crop: tuple[CropSide, CropSide] = Field(
        (512, 512), description="height and width of training inputs, in pixels: multiples of 32"
    )
    scale: tuple[Positive, Positive] = Field(
        (2048, 512), description="an image is resized, its aspect kept, to fit into these (long, short) sides"
    )
    scale_range: tuple[Ratio, Ratio] = Field(
        (0.5, 2.0), description="in training, times a random factor from this range"
    )
    cat_max_ratio: float = Field(
        0.75, gt=0, le=1, description="largest share of one class in a crop, of ten that are tried; 1: any crop will do"
    )
    distortion: bool = Field(True, description="random changes of brightness, contrast, saturation and hue")
    dropout: float = Field(0.1, ge=0, lt=1, description="of channels, before the last convolution")
    neck_channels: Positive = Field(256, description="channels of the feature pyramid")
    head_channels: Positive = Field(128, description="channels of the head")
    test_scale: tuple[Positive, Positive] | None = Field(
        None, description="as scale, in evaluation and prediction; null: the same as scale"
    )
    test: Literal["whole", "slide"] = Field(
        "whole", description="whole: the network sees the whole image; slide: overlapping windows of it"
    )
    window: tuple[Positive, Positive] | None = Field(
        None, description="slide: height and width of a window; null: those of crop"
    )
    stride: tuple[Positive, Positive] | None = Field(
        None, description="slide: rows and columns from one window to the next; null: two thirds of window"
    )
    test_ratios: tuple[Ratio, ...] = Field(
        (1.0,), min_length=1, description="factors of test_scale; the probabilities at several are averaged"
    )
    test_flip: bool = Field(False, description="average with the mirrored image's probabilities")
    divisor: Positive = Field(1, description="in evaluation, sides are rounded up to a multiple (PVT's recipe: 32)")

    @field_validator("scale_range")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        """task.scale_range has the smaller number first."""
        if value[0] > value[1]:
            raise ValueError(f"task.scale_range {list(value)} is no range: give the smaller number first")
        return value

    @field_validator("scale", "test_scale")
    @classmethod
    def _long_side_first(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        """task.scale and task.test_scale have the long side first."""
        if value and value[0] < value[1]:
            raise ValueError(f"task.scale and task.test_scale are (long side, short side), not {list(value)}")
        return value

    @model_validator(mode="after")
    def _windows_meet(self) -> "Settings":
        """task.window and task.stride belong to task.test=slide, and no pixel lies between two windows."""
        if self.test == "whole" and (self.window or self.stride):
            raise ValueError("task.window and task.stride belong to task.test=slide")
        (height, width), (rows, columns) = self.window_sides, self.strides
        if rows > height or columns > width:
            raise ValueError(
                f"task.stride {[rows, columns]} leaves out pixels between windows of {[height, width]} (task.window): "
                "give a smaller one"
            )
        return self

    @property
    def window_sides(self) -> tuple[int, int]:
        """Height and width of a window of slide."""
        return self.window or self.crop

    @property
    def strides(self) -> tuple[int, int]:
        """Rows and columns from one window of slide to the next."""
        height, width = self.window_sides
        return self.stride or (max(1, height * 2 // 3), max(1, width * 2 // 3))


def check_config(config: "Config") -> None:
    """Raise ValueError if a setting of another section does not go with segmentation."""
    refuse_settings_of_classification(config, "task.scale and task.crop")
    if config.task.test == "slide" and config.zero.stage == 3:
        raise ValueError(
            "task.test=slide needs zero.stage 0, 1 or 2: at stage 3 all ranks must call the network equally often, and "
            "the number of windows depends on an image's size"
        )
