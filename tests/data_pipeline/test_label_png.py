"""One label map: what is kept, what is rewritten, what is refused."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.label_png import LabelCoding, StoredLabel, check_label, stored_coding
from data_pipeline.validate import BadImage
from tests.data_pipeline.images import encoded, picture
from tests.data_pipeline.label_maps import SIZE, labels, pixels, png

THREE = stored_coding(3)


def check(data: bytes, coding: LabelCoding = THREE, size: tuple[int, int] = SIZE) -> StoredLabel:
    return check_label(data, coding, SIZE, size)


@pytest.mark.parametrize(("classes", "ignored"), [(1, 255), (3, 255), (255, 255), (256, 65_535), (1_000, 65_535)])
def test_a_png_of_the_stored_form_keeps_its_bytes(classes, ignored):
    values = labels(1, classes, ignored)
    for data in (png(values), png(values, compress_level=1), png(values) + b"trailing"):
        stored = check(data, stored_coding(classes))
        counts = {label: int((values == label).sum()) for label in range(classes) if (values == label).any()}
        assert stored == StoredLabel(data, *SIZE, "", counts)
    assert np.array_equal(pixels(stored.data), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_and_few_bits_are_stored_as_their_values(bits):
    values = labels(1, 3) % 2 if bits == 1 else labels(1, 3, ignored=0)
    palette = Image.fromarray(values)
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, *range(30)])
    for data in (png(values, bits=bits), encoded(palette, "PNG", bits=bits), encoded(palette, "PNG", transparency=0)):
        stored = check(data)
        assert np.array_equal(pixels(stored.data), values) and Image.open(io.BytesIO(stored.data)).mode == "L"
        assert check(stored.data).data == stored.data


def test_sixteen_bits_are_stored_in_eight_where_these_suffice():
    values = labels(1, 3)
    stored = check(png(values.astype(np.uint16)))
    assert stored.why and np.array_equal(pixels(stored.data), values) and pixels(stored.data).dtype == np.uint8
    stored = check(png(values), stored_coding(300))  # and the other way: 255 is a class now
    assert np.array_equal(pixels(stored.data), values) and pixels(stored.data).dtype == np.uint16


def test_values_are_mapped():
    values = labels(1, 5, ignored=200)
    reduced = check(png(values), LabelCoding((1, 2, 3, 4), (0, 200)))
    expected = np.array([255, 0, 1, 2, 3])[np.where(values == 200, 0, values)]
    assert np.array_equal(pixels(reduced.data), expected) and reduced.why == "other values"
    picked = check(png(values), LabelCoding((4, 2), (0, 1, 3, 200)))  # class 0 is the value 4
    expected = np.array([255, 255, 1, 255, 0])[np.where(values == 200, 0, values)]
    assert np.array_equal(pixels(picked.data), expected)


def test_a_resize_takes_the_nearest_pixel():
    values = labels(1)
    for size in ((20, 15), (13, 7), (39, 30), (1, 1)):
        stored = check(png(values), size=size)
        x, y = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, SIZE, strict=True))
        assert np.array_equal(pixels(stored.data), values[y[:, None], x])
        assert (stored.width, stored.height) == size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(labels(1, size=(30, 40))), "it has 30x40 pixels, and its image 40x30"),
        (png(labels(1, classes=4)), r"the pixel at x 3, y 0 has the value 3; the 3 classes are 0 to 2, ignored is 255"),
        (png(np.full(SIZE[::-1], 65_535, np.uint16)), "x 0, y 0 has the value 65535"),
        (encoded(picture(1, size=SIZE), "PNG"), "it is RGB: a label map has the number of a class in each pixel"),
        (encoded(picture(1, "RGBA", SIZE), "PNG"), "it is RGB with transparency"),
        (encoded(picture(1, "LA", SIZE), "PNG"), "it is gray with transparency"),
        (encoded(Image.fromarray(labels(1))), "not a PNG"),
        (b"", "not a PNG"),
        (png(labels(1))[:-30], "Truncated File Read"),
        (png(labels(1))[:20], "."),
    ],
)
def test_what_is_refused(data, reason):
    with pytest.raises(BadImage, match=reason):
        check(data)


def test_every_flipped_bit_is_found():
    """But for the length and the checksum of the end mark, which say nothing."""
    data = png(labels(1))
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        try:
            assert check(bytes(flipped)).data[:-12] == data[:-12]
        except BadImage:
            continue
        assert place >= len(data) - 12


def test_wrong_image_data_behind_right_checksums_is_found():
    """A chunk of which half is lost, with the checksum of the rest."""
    data = png(labels(1))
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    body = b"IDAT" + data[start + 4 : start + 4 + length // 2]
    cut = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    with pytest.raises(BadImage):
        check(data[: start - 4] + cut + data[start + 8 + length :])
