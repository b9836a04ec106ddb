"""RandAugment's operations and colour jitter's as Triton kernels: one launch serves all samples, whatever they do.

A round of operations takes three launches. Every operation on single values is a table of 256 bytes per channel:
`count_levels` counts what some tables depend on, `make_tables` computes the tables, and `apply_round` looks values up,
or computes the operations that need more than one value. Results are those of augment_operations.py, bit for bit, and
of augment_geometry.py, up to the rounding of float32 sums (tests and benchmarks/augment.py count the differences).

Images are uint8 [m, 3, size, size]. Of the program (program.py), with `columns` values per sample, a round reads those
at `column`: the operation and its two arguments.
Launch with enable_fp_fusion=False: the plain path rounds each product, except where `tl.fma` stands here.
"""

import triton
import triton.language as tl

from data_pipeline.augment_choices import NOTHING as _NOTHING
from data_pipeline.augment_choices import OPERATIONS
from data_pipeline.augment_geometry import ROUNDING as _ROUNDING
from data_pipeline.augment_operations import LUMA

AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR = map(tl.constexpr, range(8))
CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = map(tl.constexpr, range(8, 15))
assert ("AutoContrast", "Rotate", "Contrast", "TranslateY") == tuple(OPERATIONS[i] for i in (0, 3, 8, 14))
NOTHING = tl.constexpr(_NOTHING)
ROUNDING = tl.constexpr(_ROUNDING)
RED, GREEN, BLUE = (tl.constexpr(int(weight)) for weight in LUMA)
THIRTEENTH = tl.constexpr(1 / 13)

MOST_CHUNKS = 8  # programs that share the counting of an image's channel
PARTS = tl.constexpr(32)  # a power of two, and at least 3 * MOST_CHUNKS


@triton.jit
def _luma(red, green, blue):
    """Pillow's luma of uint8 pixels, int32."""
    return (red.to(tl.int32) * RED + green.to(tl.int32) * GREEN + blue.to(tl.int32) * BLUE + 32768) >> 16


@triton.jit
def _clipped(values):
    """float32 → uint8: clipped to 0 … 255, then truncated."""
    return tl.minimum(tl.maximum(values, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _blend(degenerate, pixels, factor):
    return _clipped((pixels - degenerate) * factor + degenerate)


@triton.jit(do_not_specialize=["columns", "column"])
def count_levels(
    images_ptr,
    program_ptr,
    counts_ptr,  # int32 [m, chunks, 3, 256]
    columns,
    column,
    size,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
):
    """Grid (m, chunks, 3). For AutoContrast and Equalize: how often a channel has each level in a chunk's pixels.

    For Contrast: the sum of the luma of a 3 · chunks-th of the pixels, at level 0. Other samples write nothing.
    """
    sample, chunk, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks = tl.num_programs(1)
    operation = tl.load(program_ptr + sample * columns + column).to(tl.int32)
    pixels = size * size
    image_ptr = images_ptr + sample.to(tl.int64) * stride_image
    counts_ptr += ((sample.to(tl.int64) * chunks + chunk) * 3 + channel) * 256
    if (operation == AUTO_CONTRAST) | (operation == EQUALIZE):
        level = tl.arange(0, 256)
        counts = tl.zeros([256], tl.int32)
        for start in range(chunk * BLOCK, pixels, chunks * BLOCK):
            place = start + tl.arange(0, BLOCK)
            at = image_ptr + channel * stride_channel + place // size * stride_y + place % size * stride_x
            values = tl.load(at, mask=place < pixels, other=0).to(tl.int32)
            # Places beyond the image were counted at level 0.
            counts += tl.histogram(values, 256) - tl.where(level == 0, tl.maximum(start + BLOCK - pixels, 0), 0)
        tl.store(counts_ptr + level, counts)
    elif operation == CONTRAST:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range((chunk * 3 + channel) * BLOCK, pixels, chunks * 3 * BLOCK):
            place = start + tl.arange(0, BLOCK)
            at = image_ptr + place // size * stride_y + place % size * stride_x
            red = tl.load(at, mask=place < pixels, other=0)
            green = tl.load(at + stride_channel, mask=place < pixels, other=0)
            total += _luma(red, green, tl.load(at + 2 * stride_channel, mask=place < pixels, other=0))
        tl.store(counts_ptr, tl.sum(total))


@triton.jit(do_not_specialize=["columns", "column", "chunks"])
def make_tables(
    counts_ptr,
    program_ptr,
    tables_ptr,  # uint8 [m, 3, 256]
    columns,
    column,
    size,
    chunks,
):
    """Grid (m, 3). The table of an operation on single values: what each level becomes in a channel."""
    sample, channel = tl.program_id(0), tl.program_id(1)
    program_ptr += sample * columns + column
    operation = tl.load(program_ptr).to(tl.int32)
    argument = tl.load(program_ptr + 1).to(tl.float64, bitcast=True)
    counts_ptr += sample.to(tl.int64) * chunks * 3 * 256
    pixels = size * size
    level = tl.arange(0, 256)
    table = level.to(tl.uint8)
    if (operation == AUTO_CONTRAST) | (operation == EQUALIZE):
        counts = tl.zeros([256], tl.int32)
        for chunk in range(chunks):
            counts += tl.load(counts_ptr + (chunk * 3 + channel) * 256 + level)
        high = tl.max(tl.where(counts > 0, level, 0))
        if operation == AUTO_CONTRAST:
            low = tl.min(tl.where(counts > 0, level, 255))
            if high > low:
                scale = tl.full([256], 255.0, tl.float64) / (high - low).to(tl.float64)
                stretched = level.to(tl.float64) * scale - low.to(tl.float64) * scale
                table = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32).to(tl.uint8)
        else:
            step = (pixels - tl.sum(tl.where(level == high, counts, 0))) // 255
            if step > 0:
                table = tl.minimum((tl.cumsum(counts, 0) - counts + step // 2) // step, 255).to(tl.uint8)
    elif operation == INVERT:
        table = (255 - level).to(tl.uint8)
    elif operation == POSTERIZE:
        dropped = 8 - argument.to(tl.int32)
        table = ((level >> dropped) << dropped).to(tl.uint8)
    elif operation == SOLARIZE:
        table = tl.where(level < argument.to(tl.int32), level, 255 - level).to(tl.uint8)
    elif operation == SOLARIZE_ADD:
        table = tl.where(level < 128, level + argument.to(tl.int32), level).to(tl.uint8)
    elif operation == BRIGHTNESS:
        table = _clipped(level.to(tl.float32) * argument.to(tl.float32))
    elif operation == CONTRAST:
        part = tl.arange(0, PARTS)
        total = tl.sum(tl.load(counts_ptr + part * 256, mask=part < chunks * 3, other=0).to(tl.int64))
        mean = tl.floor(total.to(tl.float64) / pixels.to(tl.float64) + 0.5).to(tl.float32)
        table = _blend(mean, level.to(tl.float32), argument.to(tl.float32))
    tl.store(tables_ptr + (sample.to(tl.int64) * 3 + channel) * 256 + level, table)


@triton.jit
def _cubic(fraction, TAP: tl.constexpr):
    """The weight of tap 0 … 3 in augment_geometry.CUBIC: powers 0 … 3 of the fraction, added in this order."""
    square = fraction * fraction
    cube = square * fraction
    if TAP == 0:
        weight = (2 * square - fraction) - cube
    elif TAP == 1:
        weight = (1 - 2 * square) + cube
    elif TAP == 2:
        weight = (fraction + square) - cube
    else:
        weight = cube - square
    return weight


@triton.jit
def _source(of_column, of_row):
    """The sum of two float64 as integer part and fraction, float32 each."""
    column, row = tl.floor(of_column), tl.floor(of_row)
    fraction = (of_column - column).to(tl.float32) + (of_row - row).to(tl.float32)
    carry = tl.floor(fraction)
    return carry + column.to(tl.float32) + row.to(tl.float32), fraction - carry


@triton.jit
def _covered(first, fraction, size):
    """Whether the pixel nearest to first + fraction lies in the image."""
    nearest = first.to(tl.float32) + tl.floor(fraction + 0.5)
    return (nearest >= 0) & (nearest < size)


@triton.jit
def _filled(values, covered, fill):
    """The colour `fill` where the source does not cover the pixel. The sums are those of augment_geometry._fill."""
    return _clipped(tl.where(covered, values - fill, 0.0) + (fill + ROUNDING))


@triton.jit
def _clamp(place, last):
    return tl.minimum(tl.maximum(place, 0), last)


@triton.jit
def store(found_ptr, pixels, inside, red, green, blue):
    """Pixels of an image whose channels lie `pixels` apart."""
    tl.store(found_ptr, red, mask=inside)
    tl.store(found_ptr + pixels, green, mask=inside)
    tl.store(found_ptr + 2 * pixels, blue, mask=inside)


@triton.jit
def _rotated(image_ptr, y, x, cos, sin, size, stride_channel, stride_y, stride_x, fill):
    """Pixels of the image rotated around its centre: red, green, blue."""
    half = size.to(tl.float64) * 0.5
    x_centred, y_centred = x.to(tl.float64) + 0.5 - half, y.to(tl.float64) + 0.5 - half
    first_x, fraction_x = _source(cos * x_centred, sin * y_centred + (half - 0.5))
    first_y, fraction_y = _source(-sin * x_centred, cos * y_centred + (half - 0.5))
    covered = _covered(first_x, fraction_x, size) & _covered(first_y, fraction_y, size)
    left, top = first_x.to(tl.int32) - 1, first_y.to(tl.int32) - 1
    red, green, blue = tl.zeros_like(fraction_x), tl.zeros_like(fraction_x), tl.zeros_like(fraction_x)
    for tap_y in tl.static_range(4):
        row_ptr = image_ptr + _clamp(top + tap_y, size - 1) * stride_y
        weight_y = _cubic(fraction_y, tap_y)
        for tap_x in tl.static_range(4):
            at = row_ptr + _clamp(left + tap_x, size - 1) * stride_x
            weight = _cubic(fraction_x, tap_x) * weight_y
            red = tl.fma(weight, tl.load(at).to(tl.float32), red)
            green = tl.fma(weight, tl.load(at + stride_channel).to(tl.float32), green)
            blue = tl.fma(weight, tl.load(at + 2 * stride_channel).to(tl.float32), blue)
    return _filled(red, covered, fill[0]), _filled(green, covered, fill[1]), _filled(blue, covered, fill[2])


@triton.jit
def _shifted(image_ptr, y, x, operation, argument, size, stride_channel, stride_y, stride_x, fill):
    """Pixels of the image sheared or translated along one of its sides: red, green, blue."""
    horizontal = (operation == SHEAR_X) | (operation == TRANSLATE_X)
    sheared = (operation == SHEAR_X) | (operation == SHEAR_Y)
    across = tl.where(horizontal, y, x).to(tl.float64) + 0.5
    shift = argument * tl.where(sheared, across, size.to(tl.float64))
    whole = tl.floor(shift)
    fraction = (shift - whole).to(tl.float32)
    first = whole.to(tl.int32) + tl.where(horizontal, x, y)
    covered = _covered(first, fraction, size)
    red, green, blue = tl.zeros_like(fraction), tl.zeros_like(fraction), tl.zeros_like(fraction)
    for tap in tl.static_range(4):
        moved = _clamp(first - 1 + tap, size - 1)
        fixed = _clamp(tl.where(horizontal, y, x), size - 1)  # places beyond the image read its edge
        source_y, source_x = tl.where(horizontal, fixed, moved), tl.where(horizontal, moved, fixed)
        at = image_ptr + source_y * stride_y + source_x * stride_x
        weight = _cubic(fraction, tap)
        red = tl.fma(weight, tl.load(at).to(tl.float32), red)
        green = tl.fma(weight, tl.load(at + stride_channel).to(tl.float32), green)
        blue = tl.fma(weight, tl.load(at + 2 * stride_channel).to(tl.float32), blue)
    return _filled(red, covered, fill[0]), _filled(green, covered, fill[1]), _filled(blue, covered, fill[2])


@triton.jit
def _sharpened(at, pixel, y, x, factor, size, stride_y, stride_x):
    """A channel's pixels, blended with their smoothed surroundings; `at` points to them."""
    inner = (y > 0) & (y < size - 1) & (x > 0) & (x < size - 1)
    total = 4 * pixel.to(tl.int32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            total += tl.load(at + dy * stride_y + dx * stride_x, mask=inner, other=0).to(tl.int32)
    smooth = tl.floor(total.to(tl.float32) * THIRTEENTH + 0.5)
    return tl.where(inner, _blend(smooth, pixel.to(tl.float32), factor), pixel)


@triton.jit(do_not_specialize=["columns", "column"])
def apply_round(
    images_ptr,
    program_ptr,
    tables_ptr,
    found_ptr,  # uint8 [m, 3, size, size], contiguous
    columns,
    column,
    size,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    fill_red,  # in 0 … 255
    fill_green,
    fill_blue,
    BLOCK: tl.constexpr,
):
    """Grid (m, blocks of BLOCK pixels). Applies each sample's operation of the round."""
    sample = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixels = size * size
    inside = place < pixels
    y, x = place // size, place % size
    image_ptr = images_ptr + sample.to(tl.int64) * stride_image
    found_ptr += sample.to(tl.int64) * 3 * pixels + place
    program_ptr += sample * columns + column
    operation = tl.load(program_ptr).to(tl.int32)
    argument = tl.load(program_ptr + 1).to(tl.float64, bitcast=True)
    fill = (fill_red, fill_green, fill_blue)
    if operation == ROTATE:
        sin = tl.load(program_ptr + 2).to(tl.float64, bitcast=True)
        red, green, blue = _rotated(image_ptr, y, x, argument, sin, size, stride_channel, stride_y, stride_x, fill)
    elif operation >= SHEAR_X:
        red, green, blue = _shifted(
            image_ptr, y, x, operation, argument, size, stride_channel, stride_y, stride_x, fill
        )
    else:
        factor = argument.to(tl.float32)
        at = image_ptr + y * stride_y + x * stride_x
        at_green, at_blue = at + stride_channel, at + 2 * stride_channel
        red = tl.load(at, mask=inside, other=0)
        green = tl.load(at_green, mask=inside, other=0)
        blue = tl.load(at_blue, mask=inside, other=0)
        if operation == SHARPNESS:
            red = _sharpened(at, red, y, x, factor, size, stride_y, stride_x)
            green = _sharpened(at_green, green, y, x, factor, size, stride_y, stride_x)
            blue = _sharpened(at_blue, blue, y, x, factor, size, stride_y, stride_x)
        elif operation == COLOR:
            luma = _luma(red, green, blue).to(tl.float32)
            red = _blend(luma, red.to(tl.float32), factor)
            green = _blend(luma, green.to(tl.float32), factor)
            blue = _blend(luma, blue.to(tl.float32), factor)
        elif operation != NOTHING:
            tables_ptr += sample * 3 * 256
            red = tl.load(tables_ptr + red.to(tl.int32))
            green = tl.load(tables_ptr + 256 + green.to(tl.int32))
            blue = tl.load(tables_ptr + 512 + blue.to(tl.int32))
    store(found_ptr, pixels, inside, red, green, blue)
