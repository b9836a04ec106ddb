"""What the recipe chooses for each sample: operations, their arguments, boxes. On the host, in numpy, as a function of integer keys.

So CPU and GPU are given the same choices, and nothing waits for a device. The rules are timm's (timm.data.auto_augment and
random_erasing, 1.0.31) and torchvision's (ColorJitter), with one exception: Posterize keeps at least one bit. timm can draw 0 bits,
which old releases of Pillow made a black image and new ones refuse.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from .randomness import Stream, fold, integers, uniform

# RandAugment's operations in timm's order. A Step names them by their place in this list; -1 is "nothing".
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
NOTHING = -1
HIGHEST_LEVEL = 10.0
UNIFORM_DEVIATION = 100  # timm: a larger mstd means a level drawn uniformly from 0 to m

# The six orders of colour jitter's three operations.
JITTER_ORDERS = np.array([(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b])
JITTER_OPERATIONS = np.array([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")])

# timm's RandomErasing: area of the box relative to the image, height / width, and tries to place it.
ERASING_AREA = (0.02, 1 / 3)
ERASING_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class RandAugment:
    """`count` operations per image, each of them applied with `probability`, at level magnitude + N(0, deviation²) cut to [0, 10].

    increasing: posterize, solarize and the four enhancements grow stronger with the level, rather than by Google's scale.
    """

    magnitude: int = 10
    count: int = 2
    deviation: float = 0.0
    probability: float = 0.5
    increasing: bool = False


@dataclass(frozen=True)
class Step:
    """One operation per sample: operations int64 [m], places in OPERATIONS or NOTHING; arguments float64 [m], in the operation's unit."""

    operations: np.ndarray
    arguments: np.ndarray


@dataclass(frozen=True)
class Boxes:
    """Boxes to erase: the sample each is in (row of the batch), and its place in pixels; int64 [k] each, k ≤ m."""

    rows: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray


def parse_rand_augment(text: str) -> RandAugment:
    """timm's notation, "rand-m9-n2-mstd0.5-p0.5-inc1": after "rand" in any order, what is left out as in timm. ValueError: one sentence."""
    example = "write it like rand-m9-mstd0.5-inc1 (m: magnitude, n: operations, mstd: deviation of m, p: probability, inc: 0 or 1)"
    first, *parts = text.split("-")
    if first != "rand":
        raise ValueError(f"{text!r} does not begin with 'rand': {example}")
    values = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part)
        if not match or (match[1] in ("m", "n", "inc") and "." in match[2]):
            raise ValueError(f"{part!r} in {text!r} is not known: {example}")
        if match[1] in values:
            raise ValueError(f"{match[1]!r} is given twice in {text!r}: {example}")
        values[match[1]] = float(match[2])
    settings = RandAugment(
        magnitude=int(values.get("m", RandAugment.magnitude)),
        count=int(values.get("n", RandAugment.count)),
        deviation=values.get("mstd", RandAugment.deviation),
        probability=values.get("p", RandAugment.probability),
        increasing=bool(values.get("inc", RandAugment.increasing)),
    )
    if settings.count < 1 or settings.probability > 1 or values.get("inc", 0) > 1:
        raise ValueError(f"{text!r} needs n of at least 1, p of at most 1 and inc 0 or 1: {example}")
    return settings


def rand_augment_steps(keys: np.ndarray, settings: RandAugment) -> list[Step]:
    """The operations of the samples with the int64 keys [m]: `settings.count` steps."""
    number = uniform(fold(keys, Stream.RAND_AUGMENT), 5 * settings.count).reshape(len(keys), settings.count, 5)
    chosen = (number[..., 0] * len(OPERATIONS)).astype(np.int64)
    if settings.deviation > UNIFORM_DEVIATION:
        level = settings.magnitude * number[..., 2]
    else:
        # Box-Muller; 1 - u, because the logarithm of 0 is infinite.
        normal = np.sqrt(-2 * np.log(1 - number[..., 2])) * np.cos(2 * math.pi * number[..., 3])
        level = settings.magnitude + settings.deviation * normal
    level = np.clip(level, 0, HIGHEST_LEVEL)
    sign = np.where(number[..., 4] < 0.5, -1.0, 1.0)
    arguments = np.zeros(level.shape)
    for place, name in enumerate(OPERATIONS):
        these = chosen == place
        arguments[these] = argument(name, level[these], sign[these], settings.increasing)
    operations = np.where(number[..., 1] < settings.probability, chosen, NOTHING)
    return [Step(operations[:, i], arguments[:, i]) for i in range(settings.count)]


def argument(name: str, level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """The argument of an operation at a level in [0, 10]; `sign`, 1 or -1, is the direction of those that have one."""
    fraction = level / HIGHEST_LEVEL
    match name:
        case "Rotate":  # degrees, counter-clockwise
            return sign * (fraction * 30.0)
        case "Posterize":  # bits kept
            bits = np.trunc(fraction * 4)
            return np.maximum(4 - bits if increasing else bits, 1)
        case "Solarize":  # threshold: pixels from it on are inverted
            threshold = np.minimum(np.trunc(fraction * 256), 256)
            return 256 - threshold if increasing else threshold
        case "SolarizeAdd":  # what is added to the pixels below 128
            return np.minimum(np.trunc(fraction * 110), 128)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":  # factor: 1 changes nothing
            return np.maximum(0.1, 1.0 + sign * (fraction * 0.9)) if increasing else fraction * 1.8 + 0.1
        case "ShearX" | "ShearY":  # slope
            return sign * (fraction * 0.3)
        case "TranslateX" | "TranslateY":  # shift relative to the image
            return sign * (fraction * 0.45)
    return np.zeros_like(level)


def color_jitter_steps(keys: np.ndarray, strength: float) -> list[Step]:
    """Brightness, contrast and saturation by factors from [1 - strength, 1 + strength] (not below 0), in one of six orders: three steps."""
    keys = fold(keys, Stream.COLOR_JITTER)
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + (high - low) * uniform(keys, 3)
    order = JITTER_ORDERS[integers(keys, 6, counter=3)]
    factors = np.take_along_axis(factors, order, 1)
    return [Step(JITTER_OPERATIONS[order[:, i]], factors[:, i]) for i in range(3)]


def erasing_boxes(keys: np.ndarray, probability: float, image_height: int, image_width: int) -> Boxes:
    """Random erasing (Zhong et al., arXiv 1708.04896): the boxes of those of the samples with int64 keys [m] that are erased.

    Of 10 candidates the first that is smaller than the image in both directions; where there is none, nothing is erased.
    """
    number = uniform(fold(keys, Stream.ERASE), 2 * ERASING_ATTEMPTS + 3)
    low, high = ERASING_AREA
    area = (low + (high - low) * number[:, :ERASING_ATTEMPTS]) * (image_height * image_width)
    low, high = math.log(ERASING_ASPECT[0]), math.log(ERASING_ASPECT[1])
    aspect = np.exp(low + (high - low) * number[:, ERASING_ATTEMPTS : 2 * ERASING_ATTEMPTS])
    heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (heights < image_height) & (widths < image_width)

    rows = np.flatnonzero(fits.any(1) & (number[:, -1] < probability))
    first = fits[rows].argmax(1)
    height, width = heights[rows, first], widths[rows, first]
    top = (number[rows, -3] * (image_height - height + 1)).astype(np.int64)
    left = (number[rows, -2] * (image_width - width + 1)).astype(np.int64)
    return Boxes(rows, top, left, height, width)
