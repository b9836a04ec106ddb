import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_pipeline import native
from data_pipeline.config import AugmentConfig
from data_pipeline.crop import training_windows
from data_pipeline.decode import decode_batch
from data_pipeline.jpeg import MOST_SCANS
from tests.data_pipeline.jpegs import CORPUS, every_kind, noisy, with_pillow

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="the compiled decoder is not built")

SAMPLE = Path(__file__).parents[2] / "../shared/data/imagenet_sample.tar"
FEATURES = [features for features in range(4) if features & native.FEATURES == features]


def decode(
    data: bytes, dimensions, windows, size: int | tuple[int, int], interpolation: str = "bicubic", **options
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode all `windows` [n, 4 or 5] of one image. size: of a square, or (height, width)."""
    shape = (size, size) if isinstance(size, int) else size
    windows = np.array([(*window, 0)[:5] for window in windows], np.int32)
    out = np.full((len(windows), *shape, 3), 77, np.uint8)
    dimensions = np.tile(dimensions, (len(windows), 1))
    return out, native.decode_batch([data] * len(windows), dimensions, windows, shape, interpolation, out, **options)


def whole(data: bytes, width: int, height: int) -> np.ndarray:
    """Decode the whole image with a square window that is not resized and extends beyond the image."""
    side = max(width, height)
    out, failures = decode(data, (width, height), [(0, 0, side, side)], side, features=0)
    assert not failures
    return out[0, :height, :width]


@pytest.mark.parametrize("kind", every_kind(16, 16))
def test_a_window_is_bit_identical_to_the_same_part_of_the_whole_image(kind):
    # Sizes that are and are not multiples of 8, 16 and 32; windows of one pixel, at every edge, and across blocks.
    for width, height in [(97, 83), (64, 64), (33, 17), (7, 5), (1, 1)]:
        data = every_kind(width, height)[kind]
        image = np.pad(simplejpeg.decode_jpeg(data, colorspace="RGB"), ((50, 50), (50, 50), (0, 0)))
        for side in (1, 2, 9, 33):
            xs = {-3, -1, 0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, width - side - 1, width - side, width - 1, width // 2}
            ys = {-2, 0, 1, 8, 15, 16, 18, height - side, height - 1, height // 3}
            windows = [(x, y, side, side) for x in xs if -50 <= x < width for y in ys if -50 <= y < height]
            out, failures = decode(data, (width, height), windows, side)
            assert not failures
            for row, (x, y, _, _) in enumerate(windows):
                expected = image[y + 50 : y + 50 + side, x + 50 : x + 50 + side]
                assert np.array_equal(out[row], expected), (width, height, windows[row])


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.exists(), reason="the ImageNet sample is not there")
def test_photographs_are_bit_identical_to_a_full_decode_and_torch():
    random = np.random.default_rng(0)
    count = 0
    with tarfile.open(SAMPLE) as tar:
        for member in tar:
            if not member.name.endswith(".JPEG"):
                continue
            data = tar.extractfile(member).read()
            image = simplejpeg.decode_jpeg(data, colorspace="RGB")
            height, width = image.shape[:2]
            side = int(random.integers(1, min(width, height, 300) + 1))
            xs, ys = random.integers(0, width - side + 1, 4), random.integers(0, height - side + 1, 4)
            windows = [(x, y, side, side) for x, y in zip(xs, ys, strict=True)]
            out, failures = decode(data, (width, height), windows, side)
            assert not failures
            for row, (x, y) in enumerate(zip(xs, ys, strict=True)):
                assert np.array_equal(out[row], image[y : y + side, x : x + side]), (member.name, x, y, side)

            window = training_windows(random.integers(0, 2**62, 1), [width], [height], AugmentConfig())
            resized = np.empty((2, 1, 224, 224, 3), np.uint8)
            for decoder, pixels in zip(("native", "simplejpeg"), resized, strict=True):
                dimensions = np.array([[width, height]])
                assert not decode_batch([data], dimensions, window, (224, 224), "bicubic", pixels, decoder=decoder)
            assert np.array_equal(resized[0], resized[1]), (member.name, window)
            count += 1
    assert count == 800


@pytest.mark.parametrize("name", sorted(path.stem for path in CORPUS.glob("*.jpg")))
def test_every_kind_of_file_is_decoded_identically_or_refused(name):
    # The corpus has unusual samplings and several scans, which simplejpeg does not read.
    data = (CORPUS / f"{name}.jpg").read_bytes()
    sizes = {
        "one_pixel": (1, 1),
        "narrow": (3, 90),
        "wide": (700, 3),
        "cmyk": (24, 24),
        "scans_500": (24, 16),
        "scans_501": (24, 16),
    }
    dimensions = sizes.get(name, (49, 43))
    width, height = dimensions
    refused = {
        "12_bit": "12",
        "arithmetic": "arithmetic",
        "arithmetic_progressive": "arithmetic",
        "cmyk": "CMYK",
        "garbage": "Not a JPEG",
        "lossless": "SOF type",
        "scans_501": f"more than {MOST_SCANS} scans",
        "truncated": "end",
        "zero_tail": "",
    }
    if name in refused:
        for features in FEATURES:
            _, failures = decode(data, dimensions, [(0, 0, width, height)], 24, features=features)
            assert refused[name] in failures[0], features
        return
    image = np.pad(whole(data, width, height), ((9, 9), (9, 9), (0, 0)))
    windows = [(x, y, 9, 9) for x in range(-8, width, 5) for y in range(-8, height, 3)]
    for features in FEATURES:
        out, failures = decode(data, dimensions, windows, 9, features=features)
        assert not failures
        for row, (x, y, _, _) in enumerate(windows):
            assert np.array_equal(out[row], image[y + 9 : y + 18, x + 9 : x + 18]), (windows[row], features)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_faster_code_gives_the_same_bits(interpolation):
    random = np.random.default_rng(0)
    for kind, data in every_kind(301, 203).items():
        corner, extent = random.integers(-30, 150, (6, 2)), random.integers(1, 330, (6, 2))
        windows = np.concatenate([corner, extent, random.integers(0, 2, (6, 1))], axis=1)
        for size in (1, 5, 11, 64, (3, 50), (70, 9), (1, 1000)):
            plain, _ = decode(data, (301, 203), windows, size, interpolation, features=0)
            for features in FEATURES[1:]:
                out, failures = decode(data, (301, 203), windows, size, interpolation, features=features)
                assert not failures
                assert np.array_equal(out, plain), (kind, size, features)


def test_extreme_windows():
    data = with_pillow(noisy(1, 40, 30))
    limit = 2**31 - 1
    far = [(limit, limit, 5, 5), (-limit - 1, -limit - 1, 5, 5), (limit, 0, 65536, 1), (-limit - 1, 0, 65536, 1)]
    out, failures = decode(data, (40, 30), far, 8)
    assert not failures and not out.any()
    out, failures = decode(data, (40, 30), [(-30_000, -5, 65536, 40), (-5, -30_000, 50, 65536)], 1)
    assert not failures and not out.any()  # the image is so small a part of the window that all pixels round to 0
    for window, shape in (((-150_000, 0, 150_040, 30), (4, 3_751)), ((0, -9, 9, 150_000), (3_750, 4))):
        out, failures = decode(data, (40, 30), [window], shape)
        expected = np.zeros_like(out)
        decode_batch([data], np.array([[40, 30]]), np.array([[*window, 0]]), shape, "bicubic", expected, "simplejpeg")
        assert not failures and out.any() and np.array_equal(out, expected)
    wrong = [(0, 0, 0, 5), (0, 0, 5, -1), (0, 0, 2**20 + 1, 5), (0, 0, limit, limit), (0, 0, -limit - 1, 5)]
    _, failures = decode(data, (40, 30), wrong, 8)
    assert all("window" in failures[row] for row in range(len(wrong)))


@pytest.mark.parametrize("width", [1, 224])
@pytest.mark.parametrize("features", [FEATURES[0], FEATURES[-1]])
def test_the_largest_window_does_not_overflow(width, features):
    """Bicubic weights below 0 let the positive ones sum to more than 1."""
    for shape in ((2, 2**20), (2**20, 2)):
        white = np.full((*shape, 3), 255, np.uint8).tobytes()
        size, window = np.array([shape[::-1]]), np.array([[0, 0, *shape[::-1], 1]])
        out_shape = (2, width) if shape[0] == 2 else (width, 2)
        out = np.zeros((1, *out_shape, 3), np.uint8)
        arguments = ([white], size, window, out_shape, "bicubic", out)
        assert native.decode_batch(*arguments, encoding="raw", features=features) == {}
        assert (out == 255).all()


def test_libjpeg_decides_about_huffman_damage():
    # Damage every byte of the image data, or replace its end. Message and pixels must be the same with and without the
    # project's Huffman decoder.
    data = with_pillow(noisy(3, 48, 32), quality=60, subsampling="4:2:0")
    start = data.index(b"\xff\xda") + 14
    damaged = [
        data[:at] + bytes([value]) + data[at + 1 :]
        for at in range(start, len(data))
        for value in (0x00, 0xFF, data[at] ^ 0x10)
    ]
    ends = [
        b"",
        b"\0",
        b"\xff",
        b"\xff" * 40,
        b"\xff\0" * 9,
        b"\0" * 12,
        b"\xff\xff\xd9",
        b"\0\xff\xd9",
        b"\xff\xd0\xff\xd9",
    ]
    damaged += [data[: len(data) - cut] + end for cut in range(2, 12) for end in ends]
    refused = 0
    for number, image in enumerate(damaged):
        plain, failures = decode(image, (48, 32), [(0, 0, 48, 32)], 16, features=0)
        for features in FEATURES[1:]:
            fast, fast_failures = decode(image, (48, 32), [(0, 0, 48, 32)], 16, features=features)
            assert fast_failures == failures, number
            assert failures or np.array_equal(fast, plain), number
        refused += bool(failures)
    assert 100 < refused < len(damaged)


def test_images_of_a_batch_do_not_affect_each_other():
    # Buffers and Huffman tables are reused within a batch.
    kinds = [data for size in (90, 20, 60) for data in every_kind(size, size).values()]
    dimensions = np.repeat([[90, 90], [20, 20], [60, 60]], len(kinds) // 3, axis=0)
    width, height = dimensions.T
    windows = np.stack([np.full(len(kinds), -3), height // 3, width, height, np.arange(len(kinds)) % 2], 1)
    order = np.random.default_rng(0).permutation(len(kinds))
    kinds[3] = kinds[3][: len(kinds[3]) // 2]
    out = np.zeros((len(kinds), 33, 33, 3), np.uint8)
    failures = native.decode_batch(
        [kinds[k] for k in order], dimensions[order], windows[order], (33, 33), "bicubic", out
    )
    assert [order[row] for row in failures] == [3]
    for row, k in enumerate(order):
        if k != 3:
            alone, _ = decode(kinds[k], dimensions[k], windows[k : k + 1], 33)
            assert np.array_equal(out[row], alone[0])


def test_parallel_threads_give_the_same_result():
    images = list(every_kind(200, 150).values())
    windows = np.array([(number, 2 * number, 120, 90, number % 2) for number in range(len(images))], np.int32)
    dimensions = np.tile((200, 150), (len(images), 1))

    def work(_: int) -> np.ndarray:
        out = np.zeros((len(images), 64, 64, 3), np.uint8)
        assert not native.decode_batch(images, dimensions, windows, (64, 64), "bicubic", out)
        return out

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(40)))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_the_gil_is_released():
    # With such a long switch interval, this thread runs again only when the other one releases the GIL: during
    # decoding, or else after it.
    images, dimensions = [with_pillow(noisy(1, 3000, 2000))] * 8, np.array([[3000, 2000]] * 8)
    windows, out = np.array([[0, 0, 3000, 2000, 0]] * 8, np.int32), np.zeros((8, 8, 8, 3), np.uint8)
    finished = threading.Event()

    def work() -> None:
        native.decode_batch(images, dimensions, windows, (8, 8), "bicubic", out)
        finished.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        assert not finished.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert finished.is_set()


def test_arguments_that_do_not_fit_together_are_refused():
    data, out = with_pillow(noisy(1, 8, 8)), np.zeros((1, 4, 4, 3), np.uint8)
    windows = np.array([[0, 0, 8, 8, 0]])
    right = {"encoded": [data], "dimensions": np.array([[8, 8]]), "windows": windows, "shape": (4, 4), "out": out}
    assert not native.decode_batch(**right, interpolation="bicubic")
    for name, value in [
        *(("dimensions", np.zeros((2, 2))), ("windows", np.zeros((1, 4))), ("windows", np.zeros((0, 5)))),
        *(
            ("out", out[:, :, ::-1]),
            ("out", out.astype(np.int8)),
            ("out", np.zeros((1, 5, 4, 3), np.uint8)),
            ("shape", (4, 5)),
            ("shape", (4, 0)),
        ),
        ("encoded", [data, data]),
    ]:
        with pytest.raises(ValueError):
            native.decode_batch(**(right | {name: value}), interpolation="bicubic")
    with pytest.raises(TypeError):
        native.decode_batch(**(right | {"encoded": ["text"]}), interpolation="bicubic")


def test_a_library_with_another_interface_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert native._load() is None
