"""Untrusted images: prepare stores what training reads or leaves an image out with a reason, and runs no code of it."""

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import decode_batch
from data_pipeline.jpeg import MOST_SCANS
from data_pipeline.validate import BadImage, check_image, errors_as_bad_image
from tests.data_pipeline.images import encoded, picture
from tests.data_pipeline.jpegs import CORPUS, DECODERS, corpus, with_sampling

GOOD = encoded(picture(1), quality=90)
ROOT = Path(__file__).resolve().parents[2]


ALL = [(x, y) for x in (1, 2, 3, 4) for y in (1, 2, 3, 4)]
# The standard permits at most ten blocks per unit of an interleaved scan.
SAMPLINGS = [factors for factors in itertools.product(ALL, repeat=3) if sum(x * y for x, y in factors) <= 10]


def test_training_reads_images_that_prepare_accepts_with_every_sampling():
    """Every decoder gives the same pixels for kept and transcoded images. Files that libjpeg refuses are left out."""
    outcomes = {}
    for factors in SAMPLINGS:
        data = with_sampling(list(factors), 37, 29)
        try:
            Image.open(io.BytesIO(data)).load()
            readable = True
        except OSError:
            readable = False
        try:
            image = check_image(data)
        except BadImage:
            assert not readable, factors
            outcomes["excluded"] = outcomes.get("excluded", 0) + 1
            continue
        outcomes[image.outcome] = outcomes.get(image.outcome, 0) + 1
        pixels = []
        for decoder in DECODERS:
            out = np.zeros((1, 40, 40, 3), np.uint8)
            window = np.array([[-1, -2, 40, 40, 0]], np.int32)
            failures = decode_batch(
                [image.data], np.array([[37, 29]]), window, (40, 40), "bicubic", out, decoder=decoder
            )
            assert failures == {}, (factors, decoder)
            pixels.append(out)
        assert all(np.array_equal(pixels[0], others) for others in pixels), factors
    assert len(SAMPLINGS) == 515
    assert outcomes["kept"] >= 10 and outcomes["transcoded"] > 100 and outcomes["excluded"] > 100


def test_four_four_one_is_transcoded():
    image = check_image(corpus("441"))
    assert (image.outcome, image.why) == ("transcoded", "JPEG with unusual chroma sampling")
    original = np.asarray(Image.open(io.BytesIO(corpus("441")))).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(image.data))) - original).mean() < 3


def test_the_limit_of_scans_is_the_same_everywhere():
    """Preparation and every decoder accept 500 scans and refuse 501."""
    assert MOST_SCANS == 500
    assert check_image(corpus("scans_500")).outcome == "kept"
    with pytest.raises(BadImage, match="more than 500 scans"):
        check_image(corpus("scans_501"))
    for decoder in DECODERS:
        for name, reason in (("scans_500", {}), ("scans_501", {0: "it has more than 500 scans"})):
            out, window = np.zeros((1, 8, 8, 3), np.uint8), np.array([[0, 0, 24, 16, 0]], np.int32)
            failures = decode_batch(
                [corpus(name)], np.array([[24, 16]]), window, (8, 8), "bicubic", out, decoder=decoder
            )
            assert failures == reason


@pytest.mark.parametrize(
    "name", ["progressive_incomplete", "progressive_444_incomplete", "progressive_without_last", "scans_without_last"]
)
def test_images_with_missing_scans_are_transcoded(name):
    """Versions of libjpeg fill in missing scans differently, so the pixels of the installed version are stored."""
    image = check_image(corpus(name))
    assert image.outcome == "transcoded" and "lacks scans" in image.why
    assert check_image(image.data).outcome == "kept"


@pytest.mark.parametrize("name", ["progressive", "progressive_444", "scans", "gray", "rgb", "restarts_rows"])
def test_images_with_all_scans_are_kept(name):
    assert check_image(corpus(name)).outcome == "kept"


def test_a_complete_image_is_transcoded_only_for_its_sampling():
    image = check_image(corpus("1x3_progressive"))
    assert (image.outcome, image.why) == ("transcoded", "JPEG with unusual chroma sampling")


def png_of(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    small = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)


def jpeg_of(width: int, height: int) -> bytes:
    place = GOOD.index(b"\xff\xc0")
    return GOOD[: place + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + GOOD[place + 9 :]


BAD_IMAGES = {
    "a bomb.png": png_of(60_000, 60_000),
    "a larger bomb.png": png_of(2**31 - 1, 2**31 - 1),
    "a bomb.jpg": jpeg_of(65_500, 65_500),
    "no pixels.jpg": jpeg_of(0, 0),
    "PostScript.jpg": encoded(picture(7), "EPS"),
    "only its first line.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
    "a PDF.jpg": encoded(picture(7), "PDF"),
    "a zip.png": b"PK\x03\x04" + bytes(300),
    "a script.gif": b"#!/bin/sh\ntouch /tmp/was-run\n",
    "an SVG.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "a header without end.jpg": b"\xff\xd8" + b"\xff\xe1\xff\xff" * 5000,
    "only markers.jpg": b"\xff\xd8" + b"\xff\xda\x00\x00" * 5000,
    "a PPM of many digits.ppm": b"P6 " + b"9" * 5000 + b" 1 255\n",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_files_that_are_not_images_are_refused(name):
    with pytest.raises(BadImage) as raised:
        check_image(BAD_IMAGES[name])
    assert 0 < len(str(raised.value)) < 400


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF files
def test_damaged_files_of_every_kind_are_bad_images_or_usable():
    """No other exception is raised for 2,000 files with bytes changed, removed or inserted."""
    random = np.random.default_rng(0)
    kinds = ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG", "JPEG2000"]
    files = [encoded(picture(number, size=(24, 18)), kind) for number, kind in enumerate(kinds)]
    files += [corpus(path.stem) for path in sorted(CORPUS.glob("*.jpg"))]
    usable = 0
    for number in range(2000):
        data = bytearray(files[number % len(files)])
        for _ in range(random.integers(1, 6)):
            at = int(random.integers(len(data)))
            data[at : at + int(random.integers(0, 9))] = random.bytes(int(random.integers(0, 9)))
        try:
            image = check_image(bytes(data))
        except BadImage:
            continue
        usable += 1
        out, size = np.zeros((1, 8, 8, 3), np.uint8), (image.width, image.height)
        window = np.array([[0, 0, *size, 0]], np.int32)
        assert decode_batch([image.data], np.array([size]), window, (8, 8), "bicubic", out) == {}, number
    assert 100 < usable < 1900


def test_errors_of_the_machine_are_not_faults_of_a_sample():
    for error in (MemoryError(), OSError(5, "Input/output error"), ImportError("no simplejpeg")):
        with pytest.raises(type(error)), errors_as_bad_image():
            raise error
    truncated = OSError("image file is truncated")
    for error in (KeyError(6), RecursionError("deep"), truncated, AssertionError(), OverflowError("large")):
        with pytest.raises(BadImage), errors_as_bad_image():
            raise error
