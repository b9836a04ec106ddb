import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.decode import crop_and_resize, decode, decode_rgb
from tests.data_pipeline.shards import jpeg, picture


def run(data: bytes, window, size: int, interpolation: str = "bicubic") -> np.ndarray:
    out = np.full((size, size, 3), 77, np.uint8)
    decode(data, window, size, interpolation, out)
    return out


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize(("interpolation", "filter"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
@pytest.mark.parametrize("window", [(0, 0, 320, 240), (13, 7, 200, 151), (100, 100, 20, 30), (319, 239, 1, 1)])
def test_pixels_are_pillows(window, interpolation, filter):
    # Tolerance: one level. torch's uint8 resize uses the same 16-bit coefficients as Pillow, and both decode with libjpeg-turbo.
    noisy = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8) // 2 + picture(1, 320, 240) // 2
    data = simplejpeg.encode_jpeg(noisy, quality=95, colorsubsampling="444")
    x, y, width, height = window
    expected = Image.open(io.BytesIO(data)).convert("RGB").crop((x, y, x + width, y + height)).resize((96, 96), filter)
    assert difference(run(data, window, 96, interpolation), np.asarray(expected)).max() <= 1


def test_a_window_of_the_right_size_is_not_resized():
    data = jpeg(3, 60, 50)
    assert np.array_equal(run(data, (7, 5, 32, 32), 32), decode_rgb(data)[5:37, 7:39])


def test_outside_the_image_is_black():
    data = jpeg(4, 32, 32)
    padded = np.pad(decode_rgb(data), ((4, 4), (4, 4), (0, 0)))
    for x in (-4, -1, 0, 3):
        for y in (-3, 0, 4):
            assert np.array_equal(run(data, (x, y, 32, 32), 32), padded[y + 4 : y + 36, x + 4 : x + 36])
    assert (run(data, (40, 0, 32, 32), 32) == 0).all()
    assert (run(data, (-100, -100, 50, 50), 32) == 0).all()


def test_a_padded_window_is_resized_with_its_black():
    image = decode_rgb(jpeg(4, 40, 40))
    out = np.empty((20, 20, 3), np.uint8)
    crop_and_resize(image, (-10, 0, 40, 40), 20, "bilinear", out)
    expected = np.empty((20, 20, 3), np.uint8)
    crop_and_resize(np.pad(image, ((0, 0), (10, 0), (0, 0))), (0, 0, 40, 40), 20, "bilinear", expected)
    assert np.array_equal(out, expected)
    assert (out[:, :4] == 0).all()


def test_gray_becomes_rgb():
    gray = picture(5, 32, 32)[:, :, :1]
    out = run(simplejpeg.encode_jpeg(np.ascontiguousarray(gray), colorspace="GRAY", quality=100), (0, 0, 32, 32), 32)
    assert np.array_equal(out[:, :, 0], out[:, :, 2])
    assert difference(out, gray).max() <= 3


@pytest.mark.parametrize("damage", [b"", b"garbage", "truncated", "flipped"])
def test_damage_raises(damage):
    data = jpeg(6, 64, 64)
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        middle = len(data) * 2 // 3
        data = data[:middle] + b"\xff\xd8" + data[middle + 2 :]
    else:
        data = damage
    with pytest.raises(ValueError):  # libjpeg's message, whatever it is
        run(data, (0, 0, 64, 64), 32)
