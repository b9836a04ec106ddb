"""The random choices of the recipe: the operations of each sample, their arguments, and the boxes to erase.

They are computed on the host, in numpy, from integer keys, so they are the same for CPU and GPU and nothing waits for a
device. The rules are those of timm (timm.data.auto_augment and random_erasing, 1.0.31) and torchvision (ColorJitter),
with one exception: Posterize keeps at least one bit. timm can draw 0 bits, which gives a black image in old releases of
Pillow and an error in new ones.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from .randomness import Stream, fold, integers, uniform

# RandAugment's operations in timm's order. ChosenOperations refers to them by their index here; NOTHING means none.
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
UNIFORM_DEVIATION = 100  # as in timm: with a larger mstd, the level is drawn uniformly from 0 to m

# The six orders of colour jitter's three operations.
JITTER_ORDERS = np.array([(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b])
JITTER_OPERATIONS = np.array([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")])

# timm's RandomErasing: area of the box relative to the image, its height / width, and the number of attempts.
ERASING_AREA = (0.02, 1 / 3)
ERASING_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class RandAugment:
    """Settings of RandAugment (Cubuk et al., arXiv 1909.13719), as in timm.

    Each image gets `count` operations, each applied with `probability`, at the level magnitude + N(0, deviation²)
    clipped to [0, 10]. increasing: Posterize, Solarize and the four enhancements get stronger with the level, which
    they do not do in the original scale.
    """

    magnitude: int = 10
    count: int = 2
    deviation: float = 0.0
    probability: float = 0.5
    increasing: bool = False


@dataclass(frozen=True)
class ChosenOperations:
    """One operation per sample. operations: int64 [m], indices into OPERATIONS or NOTHING; arguments: float64 [m]."""

    operations: np.ndarray
    arguments: np.ndarray


@dataclass(frozen=True)
class Boxes:
    """Boxes to erase, int64 [k] each, k ≤ m. rows: the samples' rows in the batch. The other fields are in pixels."""

    rows: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray


def parse_rand_augment(text: str) -> RandAugment:
    """Parse timm's notation, "rand-m9-n2-mstd0.5-p0.5-inc1". Raises ValueError with one sentence.

    The parts after "rand" may have any order; parts that are left out have timm's defaults.
    """
    example = (
        "write it like rand-m9-mstd0.5-inc1 "
        "(m: magnitude, n: operations, mstd: deviation of m, p: probability, inc: 0 or 1)"
    )
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


def choose_rand_augment(keys: np.ndarray, settings: RandAugment) -> list[ChosenOperations]:
    """RandAugment's choices for the samples with the int64 keys [m]: `settings.count` operations per sample."""
    number = uniform(fold(keys, Stream.RAND_AUGMENT), 5 * settings.count).reshape(len(keys), settings.count, 5)
    chosen = (number[..., 0] * len(OPERATIONS)).astype(np.int64)
    if settings.deviation > UNIFORM_DEVIATION:
        level = settings.magnitude * number[..., 2]
    else:
        # Box–Muller; 1 - u, because u can be 0 and the logarithm of 0 is infinite.
        normal = np.sqrt(-2 * np.log(1 - number[..., 2])) * np.cos(2 * math.pi * number[..., 3])
        level = settings.magnitude + settings.deviation * normal
    level = np.clip(level, 0, HIGHEST_LEVEL)
    sign = np.where(number[..., 4] < 0.5, -1.0, 1.0)
    arguments = np.zeros(level.shape)
    for place, name in enumerate(OPERATIONS):
        these = chosen == place
        arguments[these] = argument(name, level[these], sign[these], settings.increasing)
    operations = np.where(number[..., 1] < settings.probability, chosen, NOTHING)
    return [ChosenOperations(operations[:, i], arguments[:, i]) for i in range(settings.count)]


def argument(name: str, level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """The argument of an operation at a level in [0, 10]. sign: 1 or -1, used by operations that have a direction."""
    fraction = level / HIGHEST_LEVEL
    match name:
        case "Rotate":  # degrees, counter-clockwise
            return sign * (fraction * 30.0)
        case "Posterize":  # bits kept
            bits = np.trunc(fraction * 4)
            return np.maximum(4 - bits if increasing else bits, 1)
        case "Solarize":  # threshold: values of at least this are inverted
            threshold = np.minimum(np.trunc(fraction * 256), 256)
            return 256 - threshold if increasing else threshold
        case "SolarizeAdd":  # number that is added to values below 128
            return np.minimum(np.trunc(fraction * 110), 128)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":  # factor: 1 changes nothing
            return np.maximum(0.1, 1.0 + sign * (fraction * 0.9)) if increasing else fraction * 1.8 + 0.1
        case "ShearX" | "ShearY":  # slope
            return sign * (fraction * 0.3)
        case "TranslateX" | "TranslateY":  # shift relative to the image's side
            return sign * (fraction * 0.45)
    return np.zeros_like(level)


def choose_color_jitter(keys: np.ndarray, strength: float) -> list[ChosenOperations]:
    """Colour jitter's choices: brightness, contrast and saturation, in one of six orders.

    Their factors are uniform in [1 - strength, 1 + strength], but not below 0.
    """
    keys = fold(keys, Stream.COLOR_JITTER)
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + (high - low) * uniform(keys, 3)
    order = JITTER_ORDERS[integers(keys, 6, counter=3)]
    factors = np.take_along_axis(factors, order, 1)
    return [ChosenOperations(JITTER_OPERATIONS[order[:, i]], factors[:, i]) for i in range(3)]


def erasing_boxes(keys: np.ndarray, probability: float, image_height: int, image_width: int) -> Boxes:
    """The boxes of random erasing (Zhong et al., arXiv 1708.04896) for the samples with the int64 keys [m].

    A sample is erased with `probability`. Its box is the first of ERASING_ATTEMPTS candidates that is smaller than the
    image in both directions; if none is, the sample is not erased.
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
