"""The `data` and `augment` sections of a config.

Imports nothing heavy, so that errors in a config are reported at once.
"""

import os
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all config sections: immutable, with an error for unknown keys and for numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# A password before the host (after a colon that is not followed by a port), a token before the host of a web address, a
# web address's query or fragment, a query with key=value elsewhere.
_SECRET = re.compile(r"://[^/@]*:(?!\d+(/|$))[^@]*@|^https?://[^/@]*@|^https?://.*[?#]|://.*\?.*=")


def has_secret(url: str) -> bool:
    """Whether a path that is a URL contains a password, a token or a signature."""
    return bool(_SECRET.search(url))


def without_secrets(text: str) -> str:
    """`text` with passwords, tokens and signatures removed from its URLs."""
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", re.sub(r"://[^/\s'\"]*@", "://", text))


class DataConfig(Section):
    path: str = Field(
        description="a prepared dataset (launch/prepare.py makes one): its folder, or a URL that fsspec reads; at a "
        "resume the same one, elsewhere"
    )
    backend: Literal["webdataset", "ffcv", "dali"] = Field(
        "webdataset",
        description="reader and decoder: our decoder on tar shards or on FFCV files, or DALI on shards",
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="gpu: dali decodes on the GPU")
    image_size: int = Field(224, ge=8, description="side of the square input, in pixels")
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="filter of the resize")
    eval_crop: float = Field(
        0.875, gt=0, le=1, description="side of evaluation's centre crop, relative to the image's short side"
    )
    shuffle: Literal["full", "block"] = Field(
        "full",
        description="full: over all samples; block: in blocks of 256 contiguous samples, 64 of them mixed at a time",
    )
    repeats: int = Field(
        1, ge=1, description="number of consecutive uses of a sample, augmented differently (repeated augmentation)"
    )
    workers: int = Field(4, ge=1, description="decoding threads per rank")
    prefetch: int = Field(4, ge=1, description="micro-batches decoded ahead per rank")
    cache_dir: str | None = Field(
        None, description="folder on the node's own disk; files of the dataset are copied to it before use"
    )
    cache_gb: float | None = Field(
        None, gt=0, description="limit of the cache's size, in GB (10^9 bytes); null: no limit"
    )

    @field_validator("path", "cache_dir")
    @classmethod
    def _is_expanded(cls, value: str | None) -> str | None:
        """~ at the start of data.path and data.cache_dir is the home folder."""
        return value if value is None or "://" in value else os.path.expanduser(value)

    @field_validator("path")
    @classmethod
    def _has_no_secret(cls, value: str) -> str:
        """A URL in data.path has no password, token or signature, because config.yaml and checkpoints store it."""
        if has_secret(value):
            raise ValueError(
                f"data.path {without_secrets(value)}: "
                "the URL has a password, a token or a query in it, which would be printed and stored; "
                "leave it out, and give it to fsspec in a file of ~/.config/fsspec (docs/data.md, Credentials)"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        """data.device gpu needs data.backend dali; a URL in data.path and data.cache_gb need data.cache_dir."""
        if self.device == "gpu" and self.backend != "dali":
            raise ValueError(f"data.device gpu needs data.backend dali: {self.backend} decodes on the CPU")
        if "://" in self.path and self.cache_dir is None:
            raise ValueError(
                f"data.path {self.path} is a URL: set data.cache_dir to a folder on the node's own disk for its files"
            )
        if self.cache_gb is not None and self.cache_dir is None:
            raise ValueError("data.cache_gb limits data.cache_dir, which is not set")
        return self


class AugmentConfig(Section):
    crop: Literal["resized", "padded", "none"] = Field(
        "resized",
        description="resized: random area and aspect; padded: shifted by up to crop_padding; "
        "none: evaluation's centre crop",
    )
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.08, 1.0), description="resized: range of the area, relative to the image"
    )
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="resized: range of width / height")
    crop_padding: int = Field(4, ge=0, description="padded: largest shift, in pixels of the source image")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    rand_augment: str | None = Field(
        None, description="in timm's notation, rand-m9-n2-mstd0.5-p0.5-inc1; null turns it off"
    )
    color_jitter: float = Field(
        0.0, ge=0, description="brightness, contrast and saturation change by factors of up to 1 ± this; 0: off"
    )
    erasing: Fraction = Field(0.0, description="probability of random erasing")
    erasing_mode: Literal["pixel", "const"] = Field(
        "pixel", description="pixel: normal noise per value; const: the mean colour"
    )
    mixup: float = Field(0.0, ge=0, description="alpha of mixup's Beta distribution; 0 turns it off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix's Beta distribution; 0 turns it off")
    mix_probability: Fraction = Field(1.0, description="probability that a micro-batch is mixed at all")
    switch_probability: Fraction = Field(0.5, description="if both are on: probability of cutmix instead of mixup")
    label_smoothing: Fraction = Field(0.0, description="share of a target that is spread uniformly over all classes")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="mean of red, green and blue, subtracted from pixels in 0..1"
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225),
        description="standard deviation of red, green and blue, by which the difference is divided",
    )

    @field_validator("rand_augment")
    @classmethod
    def _is_rand_augment(cls, value: str | None) -> str | None:
        """augment.rand_augment is in timm's notation and uses only settings that exist here."""
        from .augment_choices import parse_rand_augment

        if value is not None:
            try:
                parse_rand_augment(value)
            except ValueError as error:
                raise ValueError(f"augment.rand_augment: {error}") from error
        return value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        """augment.crop_scale and augment.crop_ratio are two numbers above 0, the smaller one first."""
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"must be a range, two numbers above 0 and the smaller one first, not {list(value)}")
        return value

    @field_validator("std")
    @classmethod
    def _is_positive(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        """augment.std is above 0 in every channel."""
        if min(value) <= 0:
            raise ValueError(f"must be above 0 in every channel, not {list(value)}")
        return value
