"""The `data` and `augment` sections of a config. Light: imports nothing heavy, so that a bad config is answered at once."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all config sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    path: str = Field(description="folder of a prepared dataset (launch/prepare.py makes one)")
    backend: Literal["webdataset"] = "webdataset"
    image_size: int = Field(224, ge=8, description="side of the square input, in pixels")
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    eval_crop: float = Field(0.875, gt=0, le=1, description="side of evaluation's centre crop, relative to the image's short side")
    workers: int = Field(4, ge=1, description="decoding threads per rank")
    prefetch: int = Field(4, ge=1, description="micro-batches decoded ahead per rank")


class AugmentConfig(Section):
    crop: Literal["resized", "padded", "none"] = Field(
        "resized", description="resized: random area and aspect; padded: shifted by up to crop_padding; none: evaluation's centre crop"
    )
    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="resized: range of the area, relative to the image")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="resized: range of width / height")
    crop_padding: int = Field(4, ge=0, description="padded: largest shift, in pixels of the source image")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    erasing: Fraction = Field(0.0, description="probability of random erasing (normal noise per pixel)")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup's Beta distribution; 0 turns it off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix's Beta distribution; 0 turns it off")
    mix_probability: Fraction = Field(1.0, description="probability that a micro-batch is mixed at all")
    switch_probability: Fraction = Field(0.5, description="where both are on: probability of cutmix rather than mixup")
    label_smoothing: Fraction = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be a range: two numbers above 0, the smaller one first")
        return value

    @field_validator("std")
    @classmethod
    def _is_positive(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("must be above 0 in every channel")
        return value
