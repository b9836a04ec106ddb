"""Label maps: decoded, checked, cut like their images, chosen by their classes, on their way through the loader."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.label_maps import LabelMaps, cut_labels, decode_labels
from data_pipeline.loader import build_loader
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import DataError, Split
from data_pipeline.views import ScaledCrops
from tests.data_pipeline.images import encoded, run
from tests.data_pipeline.label_maps import make_folder, pixels, stored_pairs
from tests.data_pipeline.labelled_splits import (
    CLASSES,
    SIZES,
    VIEWS,
    config_of,
    evaluate,
    images_of,
    label_map,
    same,
    train,
    write,
)
from tests.data_pipeline.shards import add_beton, jpeg, png, write_split

WITHOUT_DALI = "nvidia-dali is not installed (the optional extra `dali`)"


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return write(tmp_path_factory.mktemp("labelled"))


# --- one label map ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_cut_is_the_nearest_pixel(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 255, random.integers(1, 40, 2), dtype=np.uint8)
    x, y, width, height, flip = window = [*random.integers(-30, 30, 2), *random.integers(1, 90, 2), seed % 2]
    shape = tuple(random.integers(1, 50, 2).tolist())
    cut, (left, top, right, bottom) = cut_labels(labels, np.array(window), shape, 255)
    inside = np.zeros(shape, bool)
    inside[top:bottom, left:right] = True
    for i, j in np.ndindex(shape):
        row = y + (2 * i + 1) * height // (2 * shape[0])
        column = x + (2 * (shape[1] - 1 - j if flip else j) + 1) * width // (2 * shape[1])
        there = 0 <= row < labels.shape[0] and 0 <= column < labels.shape[1]
        assert inside[i, j] == there and cut[i, j] == (labels[row, column] if there else 255)


def test_labels_of_8_and_of_16_bits():
    labels = label_map(0, 20, 10)
    found = decode_labels(png(labels), (20, 10), CLASSES)
    assert found.dtype == np.uint8 and np.array_equal(found, labels)
    wide = np.where(labels == 255, 65535, labels.astype(np.uint16) * 80).astype(np.uint16)
    found = decode_labels(png(wide), (20, 10), 321)
    assert found.dtype == np.int32 and np.array_equal(found, wide)


GRAY = label_map(0, 20, 10)
BAD = {
    "another_size": (png(label_map(0, 21, 10)), "it is 21x10 pixels where its image has 20x10"),
    "value": (png(np.full((10, 20), 5, np.uint8)), r"it has the value 5, and the classes are 0 to 4 \(255: ignored\)"),
    "palette": (
        encoded(Image.fromarray(GRAY).convert("P"), "PNG"),
        "it is not gray of 8 bits, as label maps of 5 classes",
    ),
    "rgb": (encoded(Image.fromarray(GRAY).convert("RGB"), "PNG"), "it is not gray of 8 bits"),
    "16_bits": (png(GRAY.astype(np.uint16)), "it is not gray of 8 bits"),
    "jpeg": (jpeg(0, 20, 10), "cannot identify image file"),
    "cut": (png(np.random.default_rng(0).integers(0, 5, (10, 20), dtype=np.uint8))[:-60], "truncated"),
    "empty": (b"", "cannot identify image file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_label_map_is_refused(kind):
    data, reason = BAD[kind]
    with pytest.raises(ValueError, match=reason):
        decode_labels(data, (20, 10), CLASSES)


def test_the_first_candidate_with_mixed_classes_is_chosen(tmp_path):
    labels = np.zeros((64, 128), np.uint8)
    labels[:, 40:64:2] = 1  # half of the columns from 40 on
    labels[:, 64:96] = 255
    labels[:, 96:] = 2
    split = write(tmp_path, [png(labels)], [(128, 64)])

    def chosen(*xs: int, ratio: float = 0.75) -> int:
        candidates = np.array([[(x, 0, 24, 24, 0) for x in xs]], np.int32)
        cut = LabelMaps(split, CLASSES, True, ratio).read(np.array([0]), candidates, (24, 24))
        assert not cut.failures
        assert np.array_equal(cut.targets[0][0], labels[:24, cut.windows[0, 0] :][:, :24])
        return cut.windows[0, 0]

    assert chosen(0, 40, 41) == 40  # 0: one class alone
    assert chosen(30, 40) == 30  # 17 of 24 columns are class 0
    assert chosen(0, 28, 41) == 41  # 28: 18 of 24 are class 0, and 0.75 is not below 0.75
    assert chosen(64, 100, 0) == 0  # ignored alone, one class alone: the last
    assert chosen(88, 60) == 60  # beside ignored pixels: one class alone; the classes 0 and 1
    assert chosen(30, 40, 1, ratio=0.5) == 1


# --- images and label maps together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(0.25, 0.5), (1.0, 1.0), (1.5, 3.0)])
def test_images_and_labels_show_the_same_place(tmp_path, scale):
    """The red and green of an image are each pixel's x and y, and its label is y · width + x."""
    width, height = 240, 160
    y, x = np.mgrid[0:height, 0:width]
    image = simplejpeg.encode_jpeg(
        np.stack([x, y, 0 * x], -1).astype(np.uint8), quality=100, colorsubsampling="444", fastdct=False
    )
    labels = png((y * width + x).astype(np.uint16))
    write_split(tmp_path, [image] * 8, label_maps=[labels] * 8, classes=width * height)
    split = open_manifest(tmp_path).split("train")
    views = ScaledCrops((96, 128), (240, 160), scale, 1.0, 0.5, (240, 160))
    targets = LabelMaps(split, width * height, True)
    flips = padded = 0
    with build_loader(config_of(split), views, split, Order(0, 8, 8, 8), targets) as loader:
        for batch in islice(loader, 4):
            for pixels, label, inside in zip(
                batch.images, batch.targets["labels"], batch.targets["inside"], strict=True
            ):
                left, top, right, bottom = inside.tolist()
                assert (label[top:bottom, left:right] != 65535).all()
                assert (label == 65535).sum() == label.numel() - (right - left) * (bottom - top)
                # Beside padding and at the image's own edge the resampling mixes in what lies beyond it.
                part = slice(top + 4, bottom - 4), slice(left + 4, right - 4)
                found = label[part].long()
                for channel, place in ((0, found % width), (1, found // width)):
                    error = pixels[channel][part].float() - place
                    # JPEG changes single pixels by up to two levels: compare whole columns and rows.
                    assert error.mean(dim=channel).abs().max() < 1 and error.mean().abs() < 0.35
                flips += bool(found[0, 0] % width > found[0, -1] % width)
                padded += bool(right < 128)
    assert 8 <= flips <= 24
    assert (padded > 0) == (scale[0] < 0.5)


def test_evaluation_has_whole_images_and_whole_label_maps(split):
    for _, batch in evaluate(split):
        for number, labels in zip(batch.ids.tolist(), batch.targets["labels"], strict=True):
            assert np.array_equal(labels.numpy(), label_map(number, *SIZES[number]))
        width, height = SIZES[int(batch.ids[0])]
        factor = min(96 / max(width, height), 48 / min(width, height))
        assert batch.images.shape[2:] == (int(height * factor + 0.5), int(width * factor + 0.5))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_counts_every_image_once_on_any_number_of_ranks(split, world):
    reference = dict(evaluate(split))
    counted, lengths = [], set()
    for rank in range(world):
        batches = evaluate(split, rank=rank, world=world)
        lengths.add(len(batches))
        for number, batch in batches:
            assert same(batch, reference[number])
            counted += batch.ids[batch.counted].tolist()
    assert sorted(counted) == list(range(len(SIZES))) and len(lengths) == 1
    assert [batch.ids.tolist() for batch in reference.values()] == [[0], [1], [2], [3, 4], [5], [6], [7], [8], [9]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_windows_and_labels(split, world):
    reference = train(split, 16, batch=(8, 2))
    for rank in range(world):
        found = train(split, 16 // world, batch=(8, 2), rank=rank, world=world, workers=1 + rank, prefetch=3)
        assert all(map(same, found, [batch for batch in reference if batch.index % world == rank]))


def test_a_later_start_changes_nothing(split):
    targets = LabelMaps(split, CLASSES, True, VIEWS.cat_max_ratio)
    with build_loader(config_of(split), VIEWS, split, Order(0, 10, 4, 2), targets, start_step=3) as loader:
        assert all(map(same, train(split, 12)[6:], islice(loader, 6)))


@pytest.mark.parametrize("backend", ["jpeg", "raw", "dali"])
def test_every_backend_gives_the_same_images_and_labels(split, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
        other, name = split, "dali"
    else:
        images = images_of(SIZES)
        stored = [simplejpeg.decode_jpeg(image, "RGB").tobytes() for image in images] if backend == "raw" else images
        other, name = add_beton(split, stored, backend), "ffcv"
    pairs = [*zip(train(split), train(other, backend=name), strict=True)]
    pairs += zip(
        (batch for _, batch in evaluate(split)), (batch for _, batch in evaluate(other, backend=name)), strict=True
    )
    for one, found in pairs:
        assert same(one, found, images=name == "ffcv")
        assert (one.images.float() - found.images.float()).abs().mean(dim=(1, 2, 3)).max() < 0.5


def test_a_prepared_dataset_has_the_labels_of_its_source(tmp_path):
    assert run(make_folder(tmp_path / "streets"), tmp_path / "set")
    for name, count in (("train", 6), ("val", 3)):
        cut = LabelMaps(open_manifest(tmp_path / "set").split(name), 3, False).read(
            np.arange(count), np.zeros((count, 1, 5), np.int32), (1, 1)
        )
        assert not cut.failures
        expected = [pixels(label) for _, label in stored_pairs(tmp_path / "set", name)]
        assert all(np.array_equal(*pair) for pair in zip(cut.targets, expected, strict=True))


def test_label_maps_need_shards(split):
    with pytest.raises(DataError, match="has no shards of split 'train', and its label maps lie in them"):
        LabelMaps(replace(split, shards=()), CLASSES, False)
