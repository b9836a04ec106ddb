"""Boxes on their way through the loader: they are where the decoded pixels show their objects."""

import numpy as np
import pytest
import simplejpeg
import torch

from data_pipeline.object_targets import ObjectTargets, choose, move_boxes, shown_part
from data_pipeline.split import DataError
from data_pipeline.views import CANDIDATES
from tests.data_pipeline.boxed_splits import (
    COLOURS,
    CROPS,
    RANGE,
    SCALES,
    SIZES,
    add_objects,
    boxes_of,
    evaluate,
    jpeg,
    picture,
    train,
    write,
)
from tests.data_pipeline.labelled_splits import same
from tests.data_pipeline.shards import add_beton, write_split

WITHOUT_DALI = "nvidia-dali is not installed (the optional extra `dali`)"
KINDS = {"scales": SCALES, "crops": CROPS, "range": RANGE}


@pytest.fixture
def split(tmp_path):
    return write(tmp_path)


def found_rectangles(image: torch.Tensor) -> dict[int, tuple[int, int, int, int]]:
    """{label: (left, top, right, bottom)} of the pixels [3, H, W] that are nearer to a class's colour than to gray."""
    pixels = image.permute(1, 2, 0).numpy().astype(float)
    found = {}
    for label, colour in enumerate(COLOURS.astype(float)):
        towards = colour - 120
        share = (pixels - 120) @ towards / (towards @ towards)
        near = (np.abs(pixels - colour).max(axis=2) < 115) & (share > 0.5)
        if near.any():
            rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
            found[label] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_where_the_pixels_show_them(split, kind):
    """Scaled, cropped, mirrored and padded: every rectangle's edges, read off the decoded image, within a pixel."""
    flips, checked, cut = set(), 0, 0
    for batch in train(split, 36, views=KINDS[kind], seed=1):
        targets, (height, width) = batch.targets, batch.images.shape[2:]
        assert height % KINDS[kind].divisor == width % KINDS[kind].divisor == 0
        for row, number in enumerate(batch.ids.tolist()):
            found = found_rectangles(batch.images[row])
            labels = targets["labels"][row]
            boxes = {int(label): box for label, box in zip(labels, targets["boxes"][row].tolist(), strict=True)}
            boxes.pop(-1, None)
            # One that is shown by less than a stored pixel, two or three pixels here, is left out.
            for label, rectangle in found.items():
                assert label in boxes or min(rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]) <= 4
            for label, box in boxes.items():
                assert label in found and np.abs(np.array(box) - found[label]).max() <= 1.0, (number, label)
                left, top, right, bottom = targets["inside"][row].tolist()
                assert box[0] >= left - 0.51 and box[1] >= top - 0.51
                assert box[2] <= right + 0.51 and box[3] <= bottom + 0.51
                checked += 1
            stored = boxes_of(number, *SIZES[number])
            assert set(boxes) <= {label for *_, label in stored}
            cut += len(stored) - len(boxes)
            if len(stored) == 4 and len(boxes) == 4:  # label 0 is on the left of label 1
                flips.add(boxes[0][0] > boxes[1][0])
    assert flips == {False, True} and checked > 120
    assert (cut > 0) == (kind == "crops")


def test_padding_is_outside_and_black(split):
    padded = 0
    for batch in train(split, 30):
        for image, (left, top, right, bottom) in zip(batch.images, batch.targets["inside"].tolist(), strict=True):
            assert left == top == 0  # at the right and at the bottom, mirrored or not
            assert image[:, :bottom, :right].float().mean(dim=0).min() > 10  # nothing black inside
            assert image[:, bottom + 2 :].float().mean() < 3 or bottom + 2 >= image.shape[1]
            assert image[:, :, right + 2 :].float().mean() < 3 or right + 2 >= image.shape[2]
            padded += right < image.shape[2]
    assert padded > 5


def test_a_micro_batch_is_of_one_orientation_and_in_its_shape(split):
    portrait = np.array([width < height for width, height in SIZES])
    shapes = set()
    for batch in train(split, 60):
        kinds = portrait[batch.ids.numpy()]
        assert kinds.all() or not kinds.any()
        height, width = batch.images.shape[2:]
        assert (height > width) if kinds[0] else (height <= width)
        shapes.add((height, width))
    assert 4 < len(shapes) <= SCALES.most_shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_windows_and_boxes(split, world, kind):
    reference = train(split, 12, views=KINDS[kind], batch=(4, 1))
    for rank in range(world):
        options = {"rank": rank, "world": world, "workers": 1 + rank, "prefetch": 3}
        found = train(split, 12 // world, views=KINDS[kind], batch=(4, 1), **options)
        assert all(map(same, found, [batch for batch in reference if batch.index % world == rank]))


def test_a_later_start_changes_nothing(split):
    assert all(map(same, train(split, 12)[6:], train(split, 6, first=3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_is_replaced_in_its_micro_batch_s_shape(tmp_path, kind):
    """By one of its group, whose boxes are where it then is; also a larger or smaller one."""
    boxes = [boxes_of(number, *size) for number, size in enumerate(SIZES)]
    images = [jpeg(picture(some, *size)) for some, size in zip(boxes, SIZES, strict=True)]
    sound = train(write(tmp_path / "sound"), 40, views=KINDS[kind])
    for number in (0, 8):
        images[number] = images[number][:200]
    split = write_split(tmp_path / "damaged", images, labels=[0] * len(images), sizes=SIZES)
    rows = [[(x, y, w, h, w * h, label, 0, 1) for x, y, w, h, label in some] for some in boxes]
    split = add_objects(split, rows)
    replaced = []
    for batch, reference in zip(train(split, 40, views=KINDS[kind]), sound, strict=True):
        assert batch.images.shape == reference.images.shape
        for row, (number, planned) in enumerate(zip(batch.ids.tolist(), reference.ids.tolist(), strict=True)):
            if number == planned:
                assert torch.equal(batch.images[row], reference.images[row])
                continue
            assert planned in (0, 8) and (SIZES[number][0] < SIZES[number][1]) == (planned == 8)
            replaced.append(planned)
            found, labels = found_rectangles(batch.images[row]), batch.targets["labels"][row].tolist()
            for label, box in zip(labels, batch.targets["boxes"][row].tolist(), strict=True):
                assert label == -1 or np.abs(np.array(box) - found[label]).max() <= 1.0
    assert set(replaced) == {0, 8}


@pytest.mark.parametrize("backend", ["jpeg", "raw", "dali"])
def test_every_backend_gives_the_same_images_and_boxes(split, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason=WITHOUT_DALI)
        other, name = split, "dali"
    else:
        images = [jpeg(picture(boxes_of(number, *size), *size)) for number, size in enumerate(SIZES)]
        stored = [simplejpeg.decode_jpeg(image, "RGB").tobytes() for image in images] if backend == "raw" else images
        other, name = add_beton(split, stored, backend), "ffcv"
    pairs = list(zip(train(split, 12, views=CROPS), train(other, 12, views=CROPS, backend=name), strict=True))
    pairs += [(one, found) for (_, one), (_, found) in zip(evaluate(split), evaluate(other, backend=name), strict=True)]
    for one, found in pairs:
        assert same(one, found, images=name == "ffcv")
        assert (one.images.float() - found.images.float()).abs().mean(dim=(1, 2, 3)).max() < 1.0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_counts_every_image_once_and_says_how_to_go_back(split, world):
    reference = dict(evaluate(split))
    counted = []
    for rank in range(world):
        for number, batch in evaluate(split, rank=rank, world=world):
            assert same(batch, reference[number])
            counted += batch.ids[batch.counted].tolist()
    assert sorted(counted) == list(range(len(SIZES)))
    for batch in reference.values():
        height, width = batch.images.shape[2:]
        for row, number in enumerate(batch.ids.tolist()):
            stored = SIZES[number]
            assert batch.targets["sizes"][row].tolist() == list(stored)
            factor = min(213 / max(stored), 128 / min(stored))
            left, top, right, bottom = batch.targets["inside"][row].tolist()
            assert (left, top) == (0, 0)
            assert abs(right - int(stored[0] * factor + 0.5)) <= 1 and abs(bottom - int(stored[1] * factor + 0.5)) <= 1
            found, factors = found_rectangles(batch.images[row]), batch.targets["factors"][row].tolist()
            for x, y, w, h, label in boxes_of(number, *stored):
                expected = np.array([x, y, x + w, y + h]) * np.tile(factors, 2)
                assert np.abs(expected - found[label]).max() <= 1.0
        assert height % 32 == width % 32 == 0


def test_what_cannot_be_learnt_from_is_left_out(tmp_path):
    """mmdetection's rules: clipped to the image first; crowds, no area, and less than a pixel wide or high."""
    rows = [
        (-10.0, 5.0, 30.0, 20.5, 600.0, 0, 0, 1),  # partly outside
        (10.0, 10.0, 20.0, 20.0, 400.0, 1, 1, 2),  # a crowd
        (10.0, 10.0, 20.0, 20.0, 0.0, 1, 0, 3),  # no area
        (10.0, 10.0, 0.9, 20.0, 18.0, 1, 0, 4),  # narrow
        (-9.5, 10.0, 10.0, 20.0, 200.0, 1, 0, 5),  # narrow in the image
        (60.0, 30.0, 50.0, 50.0, 2500.0, 2, 0, 6),  # over the corner
    ]
    images = [jpeg(picture([], 90, 60)), jpeg(picture([], 90, 60))]
    split = add_objects(write_split(tmp_path, images, labels=[0, 0]), [rows, []])
    targets = ObjectTargets(split, training=True)
    window = np.array([[0, 0, 90, 60, 0]], np.int32)
    whole = targets.collate(targets.read(np.arange(2), np.stack([window, window]), (120, 180)).targets)
    assert whole["boxes"].dtype == torch.float32 and whole["labels"].dtype == torch.int64
    assert whole["boxes"].shape == (2, 8, 4) and whole["labels"].shape == (2, 8)
    assert whole["boxes"][0, :2].tolist() == [[0, 10, 40, 51], [120, 60, 180, 120]]
    assert whole["labels"][0].tolist() == [0, 2] + 6 * [-1] and (whole["labels"][1] == -1).all()
    assert whole["inside"].tolist() == 2 * [[0, 0, 180, 120]]


def test_what_cannot_be_learnt_from_chooses_no_place(tmp_path):
    """Nor does the part of a box outside of its image."""
    rows = [(70.0, 10.0, 0.5, 20.0, 10.0, 1, 0, 1), (-40.0, 10.0, 60.0, 20.0, 1200.0, 0, 0, 2)]
    split = add_objects(write_split(tmp_path, [jpeg(picture([], 90, 60))], labels=[0]), [rows])
    candidates = np.array([[(60, 0, 20, 60, 0), (0, 0, 12, 60, 0), (30, 0, 10, 60, 0)]], np.int32)
    cut = ObjectTargets(split, training=True).read(np.array([0]), candidates, (60, 20))
    assert cut.windows.tolist() == [[0, 0, 12, 60, 0]]


@pytest.mark.parametrize(("count", "room"), [(0, 8), (8, 8), (9, 16), (16, 16), (40, 64)])
def test_the_room_for_boxes_is_a_power_of_two(tmp_path, count, room):
    rows = [(10.0, 10.0, 20.0, 20.0, 400.0, 1, 0, number) for number in range(count)]
    split = add_objects(write_split(tmp_path, [jpeg(picture([], 90, 60))], labels=[0]), [rows])
    targets = ObjectTargets(split, training=True)
    found = targets.read(np.array([0]), np.array([[[0, 0, 90, 60, 0]]], np.int32), (60, 90)).targets
    collated = targets.collate(found)
    assert collated["boxes"].shape == (1, room, 4) and (collated["labels"] == 1).sum() == count


def test_the_first_place_that_shows_a_box_s_centre_is_chosen():
    candidates = np.array([(x, 0, 20, 20, 0) for x in range(0, 10 * CANDIDATES, 10)], np.int32)
    one = np.array([[40.0, 2, 60, 12]])  # its centre is at 50
    assert choose(one, candidates).tolist() == [40, 0, 20, 20, 0]
    assert choose(np.array([[40.0, 30, 60, 42]]), candidates).tolist() == [90, 0, 20, 20, 0]
    assert choose(np.zeros((0, 4)), candidates).tolist() == [90, 0, 20, 20, 0]
    assert choose(np.concatenate([one, one - [[30, 0, 30, 0]]]), candidates)[0] == 10
    assert choose(one - [[50, 0, 50, 0]], candidates)[0] == 0  # its centre is the window's first place


def test_boxes_are_cut_at_the_window():
    boxes = np.array([[10.0, 10, 50, 40], [0, 0, 20.5, 12], [70, 20, 90, 60], [59, 0, 70, 11]])
    window, size = np.array([20, 10, 40, 40, 0]), np.array([90, 60])
    moved, kept = move_boxes(boxes, window, size, (80, 120))
    assert kept.tolist() == [True, False, False, True] and moved[0].tolist() == [0, 0, 90, 60]
    mirrored, kept = move_boxes(boxes, np.array([20, 10, 40, 40, 1]), size, (80, 120))
    assert kept.tolist() == [True, False, False, True] and mirrored[0].tolist() == [30, 0, 120, 60]
    assert mirrored.dtype == np.float32


def test_the_shown_part_is_that_of_segmentation():
    from data_pipeline.label_maps import cut_labels

    random = np.random.default_rng(0)
    for _ in range(300):
        width, height, w, h, left, top = random.integers(1, 60, 6)
        shape = tuple(random.integers(1, 50, 2).tolist())
        window = np.array([left - 20, top - 20, w, h, random.integers(2)], np.int32)
        _, expected = cut_labels(np.zeros((height, width), np.uint8), window, shape, 255)
        found = shown_part(window[None], np.array([[width, height]]), shape)
        assert found.dtype == np.int32
        left, top, right, bottom = found[0].tolist()
        if right > left and bottom > top:
            assert (left, top, right, bottom) == expected
        else:
            assert expected[2] == expected[0] or expected[3] == expected[1]


def test_a_split_without_boxes_is_refused(tmp_path):
    split = write_split(tmp_path, [jpeg(picture([], 90, 60))], labels=[0])
    with pytest.raises(DataError, match="has no annotation 'objects'"):
        ObjectTargets(split, training=True)
