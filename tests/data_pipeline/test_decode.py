import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline import native
from data_pipeline.decode import DECODER, crop_and_resize_batch, decode_batch
from tests.data_pipeline.jpegs import CORPUS, DECODERS, every_kind, noisy, with_pillow
from tests.data_pipeline.shards import jpeg, picture

PROJECT = Path(__file__).parents[2]

decoders = pytest.mark.parametrize("decoder", DECODERS)


def run(
    data: bytes, window, size: int | tuple[int, int], interpolation: str = "bicubic", decoder: str = DECODER
) -> np.ndarray:
    """One image that must decode. window: (x, y, width, height) or with flip. size: of a square, or (height, width)."""
    out, failures = attempt(data, window, size, interpolation, decoder)
    assert not failures
    return out


def attempt(data: bytes, window, size, interpolation: str = "bicubic", decoder: str = DECODER, dimensions=None):
    shape = (size, size) if isinstance(size, int) else size
    if dimensions is None:
        dimensions = Image.open(io.BytesIO(data)).size
    out = np.full((1, *shape, 3), 77, np.uint8)
    window = np.array([(*window, 0)[:5]], np.int32)
    failures = decode_batch([data], np.array([dimensions]), window, shape, interpolation, out, decoder=decoder)
    return out[0], failures


def full(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


def test_the_compiled_decoder_is_in_use():
    # `make setup` builds it if there are a compiler and headers; otherwise the other tests use the slower decoders.
    assert DECODER == "native" or shutil.which("cc") is None or not Path("/usr/include/jpeglib.h").exists()


@decoders
@pytest.mark.parametrize(("interpolation", "filter"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
@pytest.mark.parametrize(
    "window", [(0, 0, 320, 240), (13, 7, 200, 151), (100, 100, 20, 30), (319, 239, 1, 1), (3, 0, 310, 9)]
)
@pytest.mark.parametrize("shape", [(96, 96), (40, 130), (151, 20)])
def test_pixels_are_pillows(window, shape, interpolation, filter, decoder):
    # Tolerance: one level. Pillow's weights have 22 fractional bits, ours at least 14; all decode with libjpeg-turbo.
    data = simplejpeg.encode_jpeg(noisy(0, 320, 240), quality=95, colorsubsampling="444")
    x, y, width, height = window
    image = Image.open(io.BytesIO(data)).convert("RGB")
    expected = image.crop((x, y, x + width, y + height)).resize(shape[::-1], filter)
    differences = difference(run(data, window, shape, interpolation, decoder), np.asarray(expected))
    assert differences.max() <= 1
    assert differences.mean() < 0.1


@pytest.mark.skipif(native.LIBRARY is None, reason="the compiled decoder is not built")
@pytest.mark.parametrize("kind", every_kind(16, 16))
def test_native_and_torch_give_the_same_bits(kind):
    data = every_kind(163, 121)[kind]
    random = np.random.default_rng(0)
    for size in (1, 7, 64, 163, (30, 200), (90, 11), (1, 64)):
        for interpolation in ("bicubic", "bilinear"):
            x, y = random.integers(-20, 100, 2)
            width, height = random.integers(1, 90, 2)
            window = (x, y, width, height, random.integers(2))
            slow = run(data, window, size, interpolation, "simplejpeg")
            assert np.array_equal(run(data, window, size, interpolation, "native"), slow), (window, size, interpolation)
    # One side is not resized.
    for size in ((50, 90), (70, 60)):
        window = (20, 10, 60, 50, 1)
        assert np.array_equal(run(data, window, size, decoder="native"), run(data, window, size, decoder="simplejpeg"))


@decoders
def test_a_window_of_the_right_size_is_not_resized(decoder):
    data = jpeg(3, 60, 50)
    assert np.array_equal(run(data, (7, 5, 32, 32), 32, decoder=decoder), full(data)[5:37, 7:39])


@decoders
def test_flip_mirrors(decoder):
    data = jpeg(3, 60, 50)
    for window in [(7, 5, 32, 32), (0, 0, 60, 50), (3, 1, 40, 32), (-5, 2, 32, 10)]:
        mirrored = run(data, (*window, 1), 32, decoder=decoder)
        assert np.array_equal(mirrored, run(data, window, 32, decoder=decoder)[:, ::-1])


@decoders
def test_outside_the_image_is_black(decoder):
    data = jpeg(4, 32, 32)
    padded = np.pad(full(data), ((4, 4), (4, 4), (0, 0)))
    for x in (-4, -1, 0, 3):
        for y in (-3, 0, 4):
            expected = padded[y + 4 : y + 36, x + 4 : x + 36]
            assert np.array_equal(run(data, (x, y, 32, 32), 32, decoder=decoder), expected)
    assert (run(data, (40, 0, 32, 32), 32, decoder=decoder) == 0).all()
    assert (run(data, (-100, -100, 50, 50), 32, decoder=decoder) == 0).all()


@decoders
def test_a_padded_window_is_resized_with_its_black(decoder):
    data = jpeg(4, 40, 40)
    out = run(data, (-10, 0, 40, 40), 20, "bilinear", decoder)
    padded, dimensions, window = np.pad(full(data), ((0, 0), (10, 0), (0, 0))), np.array([[50, 40]]), (0, 0, 40, 40, 0)
    expected = np.empty((1, 20, 20, 3), np.uint8)
    crop_and_resize_batch([padded.tobytes()], dimensions, np.array([window]), (20, 20), "bilinear", expected)
    assert difference(out, expected[0]).max() <= (1 if decoder == "pillow" else 0)
    assert (out[:, :4] == 0).all()


@decoders
def test_gray_becomes_rgb(decoder):
    gray = picture(5, 32, 32)[:, :, 0]
    out = run(with_pillow(gray, quality=100), (0, 0, 32, 32), 32, decoder=decoder)
    assert np.array_equal(out[:, :, 0], out[:, :, 2])
    assert difference(out[:, :, 0], gray).max() <= 3


@decoders
def test_stored_pixels_are_cropped_as_decoded_ones(decoder):
    images = [noisy(number, 50 + number, 40) for number in range(4)]
    dimensions = np.array([(50 + number, 40) for number in range(4)])
    # Inside the image; the whole image; partly outside; not resized.
    windows = np.array([(3, 4, 30, 31, 0), (0, 0, 51, 40, 1), (-9, -9, 80, 80, 0), (1, 2, 24, 24, 1)], np.int32)
    out = np.empty((4, 24, 24, 3), np.uint8)
    stored = [image.tobytes() for image in images]
    assert not crop_and_resize_batch(stored, dimensions, windows, (24, 24), "bicubic", out, decoder=decoder)
    for number, (x, y, width, height, flip) in enumerate(windows.tolist()):
        padded = np.pad(images[number], ((40, 40), (40, 40), (0, 0)))[y + 40 : y + 40 + height, x + 40 : x + 40 + width]
        expected = np.asarray(Image.fromarray(padded).resize((24, 24), Image.BICUBIC))
        assert difference(out[number], expected[:, ::-1] if flip else expected).max() <= 1

    cut = [stored[0][:-1]]
    failures = crop_and_resize_batch(cut, dimensions[:1], windows[:1], (24, 24), "bicubic", out[:1], decoder=decoder)
    assert failures == {0: "it has 5999 bytes where 50x40 pixels take 6000"}


# --- bad input -------------------------------------------------------------------------------------------------------

PHOTO = with_pillow(noisy(6, 64, 64), quality=90, subsampling="4:2:0")
MIDDLE = len(PHOTO) // 2
# Orientation 6: rotate by a quarter turn.
EXIF = b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def corpus(name: str) -> bytes:
    return (CORPUS / f"{name}.jpg").read_bytes()


def as_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(7, 64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


REFUSED = {
    "truncated": PHOTO[:MIDDLE],
    "a marker in the middle": PHOTO[:MIDDLE] + b"\xff\xd8" + PHOTO[MIDDLE + 2 :],
    "CMYK": with_pillow(picture(8, 64, 64), "CMYK"),
    "PNG": as_png(),
    "empty": b"",
    "garbage": b"garbage" * 100,
    "only a header": PHOTO[:600],
    "12 bits": corpus("12_bit"),
    "lossless": corpus("lossless"),
}


@decoders
@pytest.mark.parametrize("name", REFUSED)
def test_bad_bytes_are_refused(name, decoder):
    dimensions = (49, 43) if name in ("12 bits", "lossless") else (64, 64)
    images = [PHOTO, REFUSED[name], PHOTO]
    out = np.zeros((3, 16, 16, 3), np.uint8)
    windows = np.array([(0, 0, 64, 64, 0)] * 3, np.int32)
    sizes = np.array([(64, 64), dimensions, (64, 64)])
    failures = decode_batch(images, sizes, windows, (16, 16), "bicubic", out, decoder=decoder)
    assert list(failures) == [1] and failures[1]
    assert np.array_equal(out[0], out[2]) and out[0].any()  # its neighbours are not affected


@decoders
def test_other_dimensions_are_refused(decoder):
    _, failures = attempt(PHOTO, (0, 0, 9, 9), 8, decoder=decoder, dimensions=(64, 65))
    assert failures == {0: "it is 64x64 pixels where the index says 64x65"}


@decoders
def test_unusual_images_are_decoded(decoder):
    assert run(with_pillow(picture(1, 1, 1)), (0, 0, 1, 1), 4, decoder=decoder).shape == (4, 4, 3)
    wide = with_pillow(noisy(2, 30_000, 8), quality=80)
    assert np.array_equal(run(wide, (29_000, 0, 8, 8), 8, decoder=decoder), full(wide)[:, 29_000:29_008])
    turned = PHOTO[:2] + EXIF + PHOTO[2:]
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    assert np.array_equal(run(turned, (0, 0, 64, 64), 64, decoder=decoder), full(PHOTO))  # orientation is ignored


def test_only_simplejpeg_detects_damage_below_the_window():
    damaged = PHOTO[:MIDDLE] + bytes(50) + PHOTO[MIDDLE + 50 :]
    assert attempt(damaged, (0, 0, 16, 8), 8, decoder="simplejpeg")[1]
    if native.LIBRARY:
        assert not attempt(damaged, (0, 0, 16, 8), 8, decoder="native")[1]


# --- choice of the decoder -------------------------------------------------------------------------------------------


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )


def test_without_the_compiled_decoder_there_is_one_warning(tmp_path):
    without_library = shutil.ignore_patterns("library*", "__pycache__")
    shutil.copytree(PROJECT / "data_pipeline", tmp_path / "data_pipeline", ignore=without_library)
    code = "import data_pipeline.decode as d, data_pipeline.backends.decoded; print(d.DECODER)"
    result = python(code, tmp_path)
    assert result.stdout == "simplejpeg\n"
    assert result.stderr.count("The compiled decoder is not built") == 1
    assert "libjpeg-dev" in result.stderr
    assert python(f"import sys; sys.modules['simplejpeg'] = None; {code}", tmp_path).stdout == "pillow\n"


def test_installation_continues_if_the_compiler_fails(tmp_path):
    native_folder = "data_pipeline/native"
    shutil.copytree(PROJECT / native_folder, tmp_path / native_folder, ignore=shutil.ignore_patterns("library*"))
    shutil.copy(PROJECT / "setup.py", tmp_path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"CC": "/bin/false"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'building extension "data_pipeline.native.library" failed' in result.stdout + result.stderr
    assert not list(tmp_path.glob("**/library*"))
