import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from data_pipeline import manifest
from data_pipeline.backends import open_backend
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import decode_batch
from data_pipeline.faults import StorageError
from data_pipeline.loader import MicroBatch, build_loader
from data_pipeline.manifest import open_manifest, read_manifest
from data_pipeline.order import Order
from data_pipeline.preparation.beton import require_ffcv
from data_pipeline.split import DataError, Split, UsageError
from data_pipeline.views import Crops
from tests.data_pipeline.images import encoded
from tests.data_pipeline.shards import add_beton, jpeg, picture, write_split

WITHOUT_DALI = "nvidia-dali is not installed (the optional extra `dali`)"
SHAPE = (32, 32)


@pytest.fixture
def images() -> list[bytes]:
    return [jpeg(number, 40 + number, 70 - number) for number in range(20)]


@pytest.fixture
def split(tmp_path, images) -> Split:
    write_split(tmp_path, images, per_shard=6)
    return open_manifest(tmp_path).split("train")


def read(
    split: Split, ids, windows=None, size: int = 24, backend: str = "webdataset"
) -> tuple[np.ndarray, dict[int, str]]:
    ids = np.asarray(ids, np.int64)
    out = np.zeros((len(ids), size, size, 3), np.uint8)
    windows = np.tile(np.array([2, 3, 30, 33, 0], np.int32), (len(ids), 1)) if windows is None else windows
    return out, open_backend(backend, split).decode_batch(ids, windows, (size, size), "bicubic", out)


def decoded(images: list[bytes], windows: np.ndarray, size: int = 24) -> np.ndarray:
    """The result of the project's decoder on the images in memory."""
    dimensions = np.array([simplejpeg.decode_jpeg_header(image)[1::-1] for image in images], np.int32)
    out = np.empty((len(images), size, size, 3), np.uint8)
    assert decode_batch(images, dimensions, windows, (size, size), "bicubic", out) == {}
    return out


def test_any_samples_in_any_order(split, images):
    ids = [19, 0, 7, 7, 12]
    pixels, failures = read(split, ids)
    assert failures == {}
    windows = np.tile(np.array([2, 3, 30, 33, 0], np.int32), (5, 1))
    assert np.array_equal(pixels, decoded([images[number] for number in ids], windows))


# --- all backends give the same pixels -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> tuple[Split, list[bytes], np.ndarray]:
    """24 images of the usual kinds of JPEG with noise and edges, and two windows of each, the second partly outside."""
    random = np.random.default_rng(7)
    images = []
    for number in range(24):
        width, height = random.integers(40, 200, 2).tolist()
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels = Image.fromarray(picture(number, width, height) // 4 * 3 + noise // 4)
        kind = number % 4
        pixels = pixels.convert("L") if kind == 3 else pixels
        images.append(encoded(pixels, quality=90, subsampling=min(kind, 2), progressive=number % 5 == 0))
    split = write_split(tmp_path_factory.mktemp("varied"), images)
    widths, heights = (np.tile(split.records[name].astype(np.int64), 2) for name in ("width", "height"))
    n = len(widths)
    width, height = random.integers(1, widths + 1), random.integers(1, heights + 1)
    x, y = random.integers(0, widths - width + 1), random.integers(0, heights - height + 1)
    x[n // 2 :] -= random.integers(-60, 60, n // 2)
    y[n // 2 :] -= random.integers(-60, 60, n // 2)
    return split, images, np.stack([x, y, width, height, random.integers(0, 2, n)], axis=1).astype(np.int32)


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_ffcv_gives_the_bits_of_webdataset(varied, mode):
    split, images, windows = varied
    stored = [simplejpeg.decode_jpeg(image, "RGB").tobytes() for image in images] if mode == "raw" else images
    ids = np.tile(np.arange(len(images)), 2)
    expected, failures = read(split, ids, windows, 64)
    assert failures == {}
    pixels, failures = read(add_beton(split, stored, mode), ids, windows, 64, "ffcv")
    assert failures == {}
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("shards", [True, False])
def test_dali_gives_nearly_the_pixels_of_webdataset(varied, shards):
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    split, images, windows = varied
    ids = np.tile(np.arange(len(images)), 2)
    expected, _ = read(split, ids, windows, 64)
    pixels, failures = read(
        split if shards else replace(add_beton(split, images, "jpeg"), shards=()), ids, windows, 64, "dali"
    )
    assert failures == {}
    assert np.abs(pixels.astype(int) - expected).mean(axis=(1, 2, 3)).max() < 0.5


def batches(split: Split, backend: str, steps: range) -> list[MicroBatch]:
    data = DataConfig(path=str(split.folder), backend=backend, image_size=32, workers=2)
    order = Order(seed=3, samples=split.samples, global_batch=12, micro_batch=6)
    with build_loader(data, Crops(data, AugmentConfig()), split, order, start_step=steps[0]) as loader:
        return list(itertools.islice(loader, 2 * len(steps)))


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_run_may_continue_with_another_backend(varied, backend):
    """Five steps of webdataset equal three steps of it followed by two of the other backend. An epoch has two steps."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    split = add_beton(varied[0], varied[1], "jpeg")
    whole = batches(split, "webdataset", range(5))
    parts = batches(split, "webdataset", range(3)) + batches(split, backend, range(3, 5))
    for one, other in zip(whole, parts, strict=True):
        assert (one.step, one.index) == (other.step, other.index)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)
        assert np.array_equal(one.draws, other.draws)
        difference = (one.images.float() - other.images.float()).abs().mean(dim=(1, 2, 3)).max()
        assert difference == 0 if backend == "ffcv" or one.step < 3 else difference < 0.5


def test_dalis_pixels_depend_on_the_sample_alone(varied):
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    split, images, windows = varied
    ids = np.tile(np.arange(len(images)), 2)
    together, _ = read(split, ids, windows, 32, "dali")
    with ThreadPoolExecutor(4) as executor:
        backend = open_backend("dali", split)
        alone = np.zeros_like(together)
        rows = [slice(row, row + 1) for row in range(len(ids))]
        failures = list(
            executor.map(
                lambda row: backend.decode_batch(ids[row], windows[row], (32, 32), "bicubic", alone[row]), rows
            )
        )
    assert not any(failures)
    assert np.array_equal(together, alone)


def test_more_images_than_a_dali_pipeline_was_built_for(varied):
    dali = pytest.importorskip("data_pipeline.backends.dali")
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    split, images, windows = varied
    backend = open_backend("dali", split)
    few, many = np.zeros((3, 16, 16, 3), np.uint8), np.zeros((2 * dali.BATCH + 5, 16, 16, 3), np.uint8)
    ids = np.arange(len(many)) % len(images)
    assert backend.decode_batch(ids[:3], windows[ids[:3]], (16, 16), "bilinear", few) == {}
    assert backend.decode_batch(ids, windows[ids], (16, 16), "bilinear", many) == {}
    assert np.array_equal(many[:3], few) and np.array_equal(many[: len(images)][:3], many[len(images) :][:3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the next test decodes on it")
def test_dalis_pipeline_for_a_gpu_is_valid():
    """Without a GPU, DALI checks the arguments of all operators and fails only in `build`."""
    dali = pytest.importorskip("data_pipeline.backends.dali")
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    for padded in (False, True):
        pipeline = dali.build_pipeline(8, 0, (32, 32), "bicubic", padded)
        with pytest.raises(RuntimeError, match="CUDA is not available"):
            pipeline.build()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_dali_on_a_gpu_gives_nearly_the_pixels_of_webdataset(varied):
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    split, images, windows = varied
    ids = np.tile(np.arange(len(images)), 2)
    expected, _ = read(split, ids, windows, 64)
    pixels = torch.zeros(expected.shape, dtype=torch.uint8, device="cuda")
    assert open_backend("dali", split).decode_batch(ids, windows, (64, 64), "bicubic", pixels) == {}
    assert np.abs(pixels.cpu().numpy().astype(int) - expected).mean(axis=(1, 2, 3)).max() < 0.5


# --- unreadable samples ----------------------------------------------------------------------------------------------


def damage(split: Split, number: int, data: bytes) -> None:
    record = split.records[number]
    with open(split.folder / split.shards[record["shard"]].file, "r+b") as file:
        file.seek(int(record["offset"]) + int(record["size"]) // 2)
        file.write(data)


def test_a_damaged_sample_is_named_and_its_neighbours_are_correct(split):
    expected, _ = read(split, [7, 8, 9])
    damage(split, 8, b"\x00\x01\x02\x03")
    pixels, failures = read(split, [7, 8, 9])
    assert list(failures) == [1]
    assert "train-00001.tar: sample 8 of split 'train'" in failures[1] and "checksum" in failures[1]
    assert np.array_equal(pixels[[0, 2]], expected[[0, 2]])


def test_a_truncated_shard_is_named(split):
    path = split.folder / split.shards[2].file
    os.truncate(path, int(split.records[13]["offset"]) + 10)
    _, failures = read(split, [13, 0])
    assert list(failures) == [0] and "train-00002.tar: sample 13 " in failures[0] and "only 10 of " in failures[0]


def test_a_missing_shard_is_an_error_of_storage_and_not_a_bad_sample(split):
    (split.folder / split.shards[3].file).unlink()
    with pytest.raises(StorageError, match=r"train-00003\.tar cannot be read any more: No such file.*Start again"):
        read(split, [0, 19])


def rewrite_index(split: Split, number: int, **fields) -> Split:
    records = np.array(split.records)
    for name, value in fields.items():
        records[name][number] = value
    records.tofile(split.index_path)
    return read_manifest(split.folder).split("train")  # read_manifest does not check the index


def test_an_index_that_disagrees_is_named(split):
    _, failures = read(rewrite_index(split, 4, height=60), [4])
    assert "sample 4 " in failures[0] and "it is 44x66 pixels where the index says 44x60" in failures[0]


def test_many_threads_read_more_shards_than_may_be_open(split, monkeypatch):
    monkeypatch.setattr(Split, "keep_open", 1)
    before = len(os.listdir("/proc/self/fd"))
    backend = open_backend("webdataset", split)
    expected, _ = read(split, range(20))
    windows = np.tile(np.array([2, 3, 30, 33, 0], np.int32), (20, 1))

    def work(seed: int, backend=backend) -> bool:
        ids = np.random.default_rng(seed).permutation(20)
        out = np.zeros((20, 24, 24, 3), np.uint8)
        return backend.decode_batch(ids, windows, (24, 24), "bicubic", out) == {} and np.array_equal(out, expected[ids])

    def slow_open(*arguments, opened=os.open) -> int:
        time.sleep(0.001)  # so that several threads open the same shard at the same time
        return opened(*arguments)

    monkeypatch.setattr(manifest.os, "open", slow_open)
    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(40)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# --- missing files and libraries -------------------------------------------------------------------------------------


def test_a_split_without_a_beton(split):
    with pytest.raises(
        DataError, match=r"has no FFCV file of split 'train'.*prepare.py SOURCE .* --formats webdataset,ffcv"
    ):
        open_backend("ffcv", split)


def test_a_split_without_shards(split, images):
    only_beton = replace(add_beton(split, images, "jpeg"), shards=())
    manifest.write_manifest(replace(open_manifest(split.folder), splits={"train": only_beton}))
    for shard in split.shards:
        (split.folder / shard.file).unlink()
    found = open_manifest(split.folder).split("train")
    assert found == only_beton and found.fingerprint == split.fingerprint
    _, failures = read(found, [3, 17], backend="ffcv")
    assert failures == {}
    with pytest.raises(DataError, match=r"has no WebDataset shards of split 'train'.*data.backend=ffcv"):
        open_backend("webdataset", found)


def test_dali_and_raw_pixels(split, images):
    pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
    raw = [simplejpeg.decode_jpeg(image, "RGB").tobytes() for image in images]
    with pytest.raises(DataError, match="has only raw pixels of split 'train'.*data.backend=ffcv"):
        open_backend("dali", replace(add_beton(split, raw, "raw"), shards=()))


def test_dali_is_not_installed(split, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(UsageError, match=r"data.backend=dali needs nvidia-dali: pip install -e '.\[dali\]'"):
        open_backend("dali", split)


def test_ffcv_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(UsageError, match=r"needs ffcv: apt-get install .*pip install -e '.\[ffcv\]'"):
        require_ffcv()
