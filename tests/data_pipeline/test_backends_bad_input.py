"""Bad images of every kind in a dataset: each backend names them and decodes their neighbours correctly."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.backends import open_backend
from data_pipeline.decode import DECODER
from data_pipeline.preparation.beton import _Samples, _Task
from data_pipeline.split import DataError, Split
from tests.data_pipeline.images import encoded
from tests.data_pipeline.shards import add_beton, jpeg, picture, write_split

SIZE = 32


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate by 90° to show
    return encoded(image, "JPEG", quality=95, exif=exif)


PICTURE = Image.fromarray(picture(1, 64, 48))
GOOD = jpeg(1, 64, 48)

BAD = {
    "truncated": GOOD[: len(GOOD) // 2],
    "zero tail": GOOD[: len(GOOD) // 2] + bytes(len(GOOD) - len(GOOD) // 2),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "PNG": encoded(PICTURE, "PNG"),
    "16-bit PNG": encoded(Image.fromarray(np.full((48, 64), 40000, np.uint16)), "PNG"),
    "animated GIF": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    "empty": b"",
    "garbage": b"garbage" * 100,
    "flipped bit in the header": GOOD[:400] + bytes([GOOD[400] ^ 4]) + GOOD[401:],
}
FINE = {
    "gray": encoded(PICTURE.convert("L"), "JPEG", quality=95),
    "rotated by EXIF": rotated_by_exif(PICTURE),
    "1x1": encoded(PICTURE.resize((1, 1)), "JPEG"),
    "30000 wide": encoded(Image.fromarray(picture(2, 30000, 8)), "JPEG", quality=95),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Split, list[str], list[bytes]]:
    """A split with correct checksums and a good image before, between and after all others; its names and its bytes."""
    names, images = ["good"], [GOOD]
    for name, data in (BAD | FINE).items():
        names += [name, "good"]
        images += [data, GOOD]
    sizes = [{"1x1": (1, 1), "30000 wide": (30000, 8)}.get(name, (64, 48)) for name in names]
    return add_beton(write_split(tmp_path_factory.mktemp("bad"), images, sizes=sizes), images, "jpeg"), names, images


@pytest.mark.parametrize("name", ["webdataset", "ffcv", "dali"])
def test_undecodable_images_are_named_and_all_others_are_correct(table, name):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed (the optional extra `dali`)")
    split, names, images = table
    ids = np.arange(len(names))
    windows = np.zeros((len(ids), 5), np.int32)
    windows[:, 2], windows[:, 3] = split.records["width"], split.records["height"]
    out = np.zeros((len(ids), SIZE, SIZE, 3), np.uint8)
    backend = open_backend(name, split)
    # libjpeg decodes zeros as image data, and the compiled decoder stops below the window, so it misses the absent end.
    unseen = {"zero tail"} if name != "dali" and DECODER == "native" else set()
    for _ in range(2):  # a second time, because failures must not affect later batches
        failures = backend.decode_batch(ids, windows, (SIZE, SIZE), "bicubic", out)
        assert [names[row] for row in sorted(failures)] == [bad for bad in BAD if bad not in unseen]
        for row, sentence in failures.items():
            assert f"sample {row} of split 'train'" in sentence and (".beton" in sentence) == (name == "ffcv")
        for row in [row for row in ids.tolist() if names[row] not in BAD]:
            image = Image.open(io.BytesIO(images[row])).convert("RGB")
            expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            assert np.abs(out[row].astype(int) - np.asarray(expected)).mean() < 0.5, names[row]


@pytest.mark.parametrize("name", ["webdataset", "ffcv", "dali"])
def test_a_bit_flipped_after_packing_is_detected(tmp_path, name):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed (the optional extra `dali`)")
    split = add_beton(write_split(tmp_path, [GOOD] * 3), [GOOD] * 3, "jpeg")
    records = split.beton_records if name == "ffcv" else split.records
    path = tmp_path / (split.beton.file if name == "ffcv" else split.shards[0].file)
    data = bytearray(path.read_bytes())
    data[int(records["offset"][1]) + len(GOOD) * 2 // 3] ^= 1  # in the image data, where libjpeg does not notice it
    path.write_bytes(data)
    out, windows = np.zeros((3, SIZE, SIZE, 3), np.uint8), np.array([[0, 0, 64, 48, 0]] * 3, np.int32)
    failures = open_backend(name, split).decode_batch(np.arange(3), windows, (SIZE, SIZE), "bicubic", out)
    assert list(failures) == [1]
    assert f"{path}: sample 1 of split 'train'" in failures[1] and "checksum does not match" in failures[1]
    assert np.array_equal(out[0], out[2]) and out[0].any()


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_bad_images_are_refused_before_ffcvs_writer_gets_them(table, mode):
    """Mode "jpeg" stores bytes, so it checks only the header of an RGB or gray JPEG; "raw" must decode the image."""
    split, names, images = table
    samples = _Samples(_Task(split, split.folder / "unused", split.folder / "unused", mode, 1))
    for row, name in enumerate(names):
        if name in BAD and (mode == "raw" or name not in ("truncated", "zero tail")):
            with pytest.raises(DataError, match=f"train-.*tar: sample {row} of split 'train'"):
                samples._load(row)
        else:
            stored = samples._load(row)
            assert (stored.data.tobytes() == images[row]) == (mode == "jpeg")
            assert mode == "jpeg" or stored.data.size == 3 * stored.width * stored.height
