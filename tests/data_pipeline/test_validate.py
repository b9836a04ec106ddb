"""The table in docs/data.md: how every kind of image is packed."""

import base64
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline import native
from data_pipeline.backends import open_backend
from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.verify import verify
from data_pipeline.validate import AS_IT_IS, BadImage, Encoding, check_image
from tests.data_pipeline.images import SAMPLE, encoded, listed, picture, run, stored
from tests.data_pipeline.jpegs import with_sampling


def decodes(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError:
        return False
    return True


def cut(data: bytes, start: int, end: int, new: bytes) -> bytes:
    return data[:start] + new + data[end:]


def flip_bit(data: bytes) -> bytes:
    """Flip a bit in the image data that strict decoding detects.

    Most bits are not detected: Huffman codes resynchronise.
    """
    flipped = (cut(data, place, place + 1, bytes([data[place] ^ 16])) for place in range(SCAN + 14, len(data)))
    return next(image for image in flipped if not decodes(image))


def photographs(count: int) -> list[bytes]:
    with tarfile.open(SAMPLE) as tar:
        members = itertools.islice((member for member in tar if member.isreg()), count)
        return [tar.extractfile(member).read() for member in members]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    return encoded(picture(9), quality=90, exif=exif)


GOOD = encoded(picture(1), quality=90)
PNG = encoded(picture(5), "PNG")
SCAN = GOOD.index(b"\xff\xda")  # the scan's header: 14 bytes in a colour image
HALF = len(GOOD) - 200  # somewhere in the image data
FRAMES = [picture(number) for number in (6, 7)]
# Made with libjpeg-turbo's cjpeg (arithmetic coding, sampling 3x1) and imagecodecs (lossless, 12 bits a sample): 16 x 8
# pixels.
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00;&K2L=TQ2L}fU2?z=d6b%du3k(?&6Au&}8Xq1V8XO!TBrYc)A}k{u94I#_EHE)NG&CP4IXyTsJT5ad"
    "GXKc{3kU!R01yEI"
    "5di<p00saM5C#9*00;pA002J#{{Xj$Q3pYN5etC-*#"
)
ODD_SAMPLING = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00;&K2L=TQ2L}fU2?z=d6b%du3k(?&6Au&}8Xq1V8XO!TBrYc)A}k{u94I#_EHE)NG&CP4IXyTsJT5ad"
    "GXL8ELjeg12@DGi7!3^="
    "G9erxGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBPqUGBW?b01*fP2mlZR0Wkmq5di}c0sq7R6#xMN0000000000"
    "00000000I6|HJ?p5C8!M"
    "000000000000000000FBBQc@>!~him0RaF20000000000000000|o!Y02vVg0{{a60000000000000001O*}^G5^{C3<CiG0ucid06zdMoW!WG"
    "TAakFu!d2*N-(Zz>Hpa"
)
LOSSLESS = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|HA+a2mlBG5CH)Z0RO}Q761VO0RR910000000000000C42>;pu2mt{A0RRBc?|a_&z3+S8_r81H_r33X-uJ!p"
    "-uJ!ld*1iG@1FO)"
    "?|a_&z3+VYz3+S8_r33X=e_TH-uJ!ld*40pd*1iG?|a_)?|a_&z3+S8_x}L@*#"
)
TWELVE_BITS = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf"
    "3je_X3k(1V01yEI"
    "5di<h02BZL0000000000000000000D|HJ?o5C8%L000000000000000000e0hQt5b00;pA002J#G<|nW8m{6z0K29QS8+f8*#"
)

KEPT, REPAIRED, TRANSCODED, EXCLUDED = "kept", "repaired", "transcoded", "excluded"
TABLE = {  # file: (its bytes, outcome, part of the reason, mode of the stored JPEG)
    "a JPEG.jpg": (GOOD, KEPT, "", "RGB"),
    "progressive.jpg": (encoded(picture(2), progressive=True), KEPT, "", "RGB"),
    "gray.jpg": (encoded(picture(3, "L")), KEPT, "", "L"),
    "rotated by EXIF.jpg": (turned(), KEPT, "", "RGB"),
    "bytes behind the image.jpg": (GOOD + b"junk" * 100, KEPT, "", "RGB"),
    "1x1.jpg": (encoded(picture(4, size=(1, 1))), KEPT, "", "RGB"),
    "30000 wide.jpg": (encoded(picture(4, size=(30_000, 8))), KEPT, "", "RGB"),
    "junk between segments.jpg": (cut(GOOD, 20, 20, b"\0\xff\0junk"), REPAIRED, "libjpeg warns", "RGB"),
    "unknown JFIF version.jpg": (cut(GOOD, 11, 12, b"\7"), REPAIRED, "libjpeg warns", "RGB"),
    "progressive parameters.jpg": (cut(GOOD, SCAN + 11, SCAN + 14, b"\0\0\0"), REPAIRED, "libjpeg warns", "RGB"),
    "CMYK.jpg": (encoded(picture(4, "CMYK")), TRANSCODED, "CMYK JPEG", "RGB"),
    "arithmetic.jpg": (ARITHMETIC, TRANSCODED, "lossless or arithmetic-coded JPEG", "L"),
    "lossless.jpg": (LOSSLESS, TRANSCODED, "lossless or arithmetic-coded JPEG", "L"),
    "odd sampling.jpg": (ODD_SAMPLING, TRANSCODED, "unusual chroma sampling", "RGB"),
    "PNG.JPEG": (PNG, TRANSCODED, "PNG to JPEG", "RGB"),
    "transparent.png": (encoded(picture(6, "RGBA"), "PNG"), TRANSCODED, "PNG to JPEG", "RGB"),
    "gray with alpha.png": (encoded(picture(6, "LA"), "PNG"), TRANSCODED, "PNG to JPEG", "L"),
    "black and white.png": (encoded(picture(6, "1"), "PNG"), TRANSCODED, "PNG to JPEG", "L"),
    "16-bit.png": (
        encoded(Image.fromarray(np.full((30, 40), 40_000, np.uint16)), "PNG"),
        TRANSCODED,
        "PNG to JPEG",
        "L",
    ),
    "animated.gif": (
        encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        TRANSCODED,
        "GIF to JPEG",
        "RGB",
    ),
    "a WebP.webp": (encoded(picture(7), "WEBP"), TRANSCODED, "WEBP to JPEG", "RGB"),
    "truncated.jpg": (GOOD[:HALF], EXCLUDED, "Premature end of JPEG file", None),
    "end marker lost.jpg": (GOOD[:-2], EXCLUDED, "Premature end of JPEG file", None),
    "zero tail.jpg": (cut(GOOD, HALF, len(GOOD), bytes(200)), EXCLUDED, "Premature end of JPEG file", None),
    "zeros inside.jpg": (cut(GOOD, HALF, len(GOOD) - 2, bytes(198)), EXCLUDED, "Corrupt JPEG data", None),
    "flipped bit.jpg": (flip_bit(GOOD), EXCLUDED, "", None),
    "junk and truncated.jpg": (cut(GOOD[:HALF], 20, 20, b"junk"), EXCLUDED, "Premature end of JPEG file", None),
    "header alone.jpg": (GOOD[:100], EXCLUDED, "a JPEG header without an end", None),
    "12-bit.jpg": (TWELVE_BITS, EXCLUDED, "Unsupported JPEG data precision 12", None),
    "a PostScript.jpg": (
        encoded(picture(7), "EPS"),
        EXCLUDED,
        "not an image of a known format",
        None,
    ),
    "empty.jpg": (b"", EXCLUDED, "an empty file", None),
    "garbage.jpg": (b"no image at all", EXCLUDED, "not an image of a known format", None),
    "truncated.png": (PNG[: len(PNG) // 2], EXCLUDED, "Truncated", None),
    "zero tail.png": (cut(PNG, len(PNG) - 40, len(PNG), bytes(40)), EXCLUDED, "broken PNG file", None),
    "zeros inside.png": (cut(PNG, len(PNG) // 2, len(PNG) // 2 + 9, bytes(9)), EXCLUDED, "broken PNG file", None),
    "another checksum.png": (cut(PNG, len(PNG) - 16, len(PNG) - 15, b"?"), EXCLUDED, "bad header checksum", None),
    "32-bit.tiff": (encoded(Image.fromarray(np.full((3, 4), 7, np.int32)), "TIFF"), EXCLUDED, "32-bit pixels", None),
    "66000 wide.png": (encoded(Image.new("L", (66_000, 2)), "PNG"), EXCLUDED, "a side has more than 65500", None),
    "90 megapixels.png": (
        encoded(Image.new("1", (10_000, 9_000)), "PNG"),
        EXCLUDED,
        "10000x9000 pixels, more than",
        None,
    ),
}


@pytest.mark.skipif(native.LIBRARY is None, reason="the compiled library is not built")
@pytest.mark.parametrize("factors", [[(1, 4), (1, 1), (1, 1)], [(4, 2), (1, 1), (1, 1)]])
def test_damage_is_found_where_only_pillow_gives_the_pixels(factors):
    data = with_sampling(factors, 64, 48)
    assert check_image(data).outcome == TRANSCODED
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    zero_tail, cut_and_ended = cut(data, middle, len(data), bytes(len(data) - middle)), data[:middle] + b"\xff\xd9"
    for bad in (zero_tail, cut_and_ended, cut(data, middle, middle + 20, b"\xff\0" * 10)):
        with pytest.raises(BadImage, match="Premature end of JPEG file|Corrupt JPEG data"):
            check_image(bad)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The images of the table, packed. Each is in a class of its own, so that its label identifies its file."""
    root = tmp_path_factory.mktemp("table")
    for number, (name, row) in enumerate(TABLE.items()):
        (root / f"source/{number:02d}").mkdir(parents=True)
        (root / f"source/{number:02d}/{name}").write_bytes(row[0])
    run(root / "source", root / "set")
    assert verify(root / "set") == []
    names = list(TABLE)
    images = {names[label]: data for data, label in stored(root / "set", "train")}
    return root / "set", images, {name.partition("/")[2]: entry for name, entry in listed(root / "set").items()}


@pytest.mark.parametrize("name", TABLE)
def test_outcome(packed, name):
    dest, images, report = packed
    data, outcome, words, mode = TABLE[name]
    if outcome == KEPT:
        assert name not in report and images[name] == data
    else:
        assert report[name][0] == outcome and words in report[name][1]
    if outcome == EXCLUDED:
        assert name not in images
        return
    image = Image.open(io.BytesIO(images[name]))
    assert image.format == "JPEG" and image.mode == mode
    assert decodes(images[name]), "training would refuse this image"
    record = open_manifest(dest).split("train").records[list(images).index(name)]
    assert (record["width"], record["height"]) == image.size == Image.open(io.BytesIO(data)).size
    if outcome == REPAIRED:
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(GOOD)))), "the repair changed pixels"
    if outcome == TRANSCODED:
        original = Image.open(io.BytesIO(data))
        pixels = np.asarray(original) >> 8 if original.mode.startswith("I;16") else np.asarray(original.convert(mode))
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 5


def test_classes_without_an_image_that_can_be_used_are_named(packed):
    excluded = [f"{number:02d}" for number, row in enumerate(TABLE.values()) if row[1] == EXCLUDED]
    assert json.loads((packed[0] / "report.json").read_text())["absent"] == {"train": excluded}


def test_orientation_is_not_applied(packed):
    """Also not if the image is encoded again."""
    [data] = [data for name, data in packed[1].items() if name == "rotated by EXIF.jpg"]
    assert Image.open(io.BytesIO(data)).size == (40, 30)
    again = Image.open(io.BytesIO(check_image(data, Encoding(max_side=20)).data))
    assert again.size == (20, 15) and not again.getexif()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pixels", [np.asarray(picture(9)), np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_orientation_of_a_tiff_is_not_applied(orientation, pixels, compression):
    """Pillow turns a TIFF by itself when it loads it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), "TIFF", exif=exif, compression=compression)
    image = check_image(data)
    assert image.full_size == (image.width, image.height) == (40, 30)
    expected = pixels if pixels.dtype == np.uint8 else pixels >> 8
    assert np.abs(np.asarray(Image.open(io.BytesIO(image.data))).astype(int) - expected).mean() < 5


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"resize_short": 15}, (40, 30), (20, 15)),
        ({"resize_short": 15}, (30, 40), (15, 20)),
        ({"resize_short": 60}, (40, 30), (40, 30)),
        ({"max_side": 20}, (30, 40), (15, 20)),
        ({"max_side": 20, "resize_short": 12}, (40, 30), (16, 12)),
        ({"max_side": 20, "resize_short": 18}, (40, 30), (20, 15)),
        ({"max_side": 100}, (3000, 4), (100, 1)),
        ({"quality": 50}, (40, 30), (40, 30)),
    ],
)
def test_sizes(options, size, expected):
    image = check_image(encoded(picture(8, size=size), quality=100), Encoding(**options))
    assert (image.width, image.height) == Image.open(io.BytesIO(image.data)).size == expected
    assert image.outcome == "reencoded"


def test_shrinking_is_antialiased():
    """Lines of one pixel become gray, not black or white."""
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255
    image = check_image(encoded(Image.fromarray(lines), quality=95), Encoding(resize_short=16))
    pixels = np.asarray(Image.open(io.BytesIO(image.data)))
    assert image.outcome == "reencoded" and np.abs(pixels[:, 2:-2].astype(int) - 127).max() < 25


def test_quality_and_sampling_of_images_that_are_encoded_again():
    """Quality 90 and 4:2:0 with an Encoding, 95 and 4:4:4 for images that are only transcoded."""
    png = picture(5, size=(64, 48))
    tables = {quality: Image.open(io.BytesIO(encoded(png, quality=quality))).quantization for quality in (60, 90, 95)}
    for encoding, quality, sampling in (
        (AS_IT_IS, 95, "444"),
        (Encoding(max_side=60), 90, "420"),
        (Encoding(quality=60), 60, "420"),
    ):
        data = check_image(encoded(png, "PNG"), encoding).data
        assert Image.open(io.BytesIO(data)).quantization == tables[quality]
        assert simplejpeg.decode_jpeg_header(data)[3] == sampling


def test_encoding_again_never_makes_an_image_larger():
    small = encoded(picture(1, size=(64, 64)), quality=30)
    image = check_image(small, Encoding(quality=95))
    assert image.data == small and image.outcome == "kept"


def test_an_image_that_is_too_wide_may_be_shrunk():
    image = check_image(TABLE["66000 wide.png"][0], Encoding(max_side=1000))
    assert (image.width, image.height, image.outcome) == (1000, 1, "transcoded")
    with pytest.raises(BadImage, match="more than 89478485"):
        check_image(TABLE["90 megapixels.png"][0], Encoding(max_side=1000))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet_sample.tar is missing")
def test_most_flipped_bits_in_a_source_are_not_detected():
    """This is why every stored image has a checksum. With -s it prints the number in docs/data.md."""
    random = np.random.default_rng(0)
    seen, images = 0, photographs(400)
    for data in images:
        place, bit = random.integers(len(data) // 3, len(data) - 2), random.integers(8)
        seen += not decodes(cut(data, place, place + 1, bytes([data[place] ^ 1 << bit])))
    print(f"strict decoding sees {seen} of {len(images)} flipped bits")
    assert 0.05 < seen / len(images) < 0.5


def test_training_reads_every_image_of_the_table(packed):
    """Uses the best available decoder."""
    split = open_manifest(packed[0]).split("train")
    windows = np.zeros((split.samples, 5), np.int32)
    windows[:, 2], windows[:, 3] = split.records["width"], split.records["height"]
    out = np.zeros((split.samples, 16, 16, 3), np.uint8)
    backend = open_backend("webdataset", split)
    assert backend.decode_batch(np.arange(split.samples), windows, (16, 16), "bicubic", out) == {}
