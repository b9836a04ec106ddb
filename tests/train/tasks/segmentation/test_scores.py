"""The confusion matrix and its scores against counts by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.loader import MicroBatch
from data_pipeline.split import DataError
from train.config import load_config
from train.tasks.drawing import from_base64
from train.tasks.segmentation.colours import paint
from train.tasks.segmentation.scores import KEPT, SegmentationTally, confusion, scores_of


def counted_one_by_one(labels: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), np.int64)
    for label, prediction in zip(labels.ravel().tolist(), found.ravel().tolist(), strict=True):
        if label < classes:
            matrix[label, prediction] += 1
    return matrix


@pytest.mark.parametrize(("classes", "ignored"), [(6, 255), (255, 255), (300, 65535)])
def test_pixels_are_counted_by_label_and_prediction(classes, ignored):
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, (2, 40, 31))
    labels[random.random(labels.shape) < 0.2] = ignored
    found = random.integers(0, classes, labels.shape)
    matrix = confusion(torch.from_numpy(labels), torch.from_numpy(found), classes)
    assert matrix.dtype == torch.int64
    assert np.array_equal(matrix.numpy(), counted_one_by_one(labels, found, classes))


def test_scores_by_the_sets_of_pixels():
    """IoU from sets, as it is defined. 4 occurs nowhere, 2 in a pixel of the prediction, 3 in one of the labels."""
    random = np.random.default_rng(1)
    labels, found = random.integers(0, 2, 500), random.integers(0, 2, 500)
    found[7], labels[8] = 2, 3
    iou, accuracy = [], []
    for number in range(5):
        labelled, predicted = ({*np.flatnonzero(values == number)} for values in (labels, found))
        if labelled | predicted:
            iou.append(len(labelled & predicted) / len(labelled | predicted))
        if labelled:
            accuracy.append(len(labelled & predicted) / len(labelled))
    assert len(iou) == 4 and iou[2:] == [0.0, 0.0] and len(accuracy) == 3
    found_scores = scores_of(confusion(torch.from_numpy(labels), torch.from_numpy(found), 5).numpy())
    assert found_scores["miou"] == pytest.approx(100 * sum(iou) / 4, rel=1e-12)
    assert found_scores["macc"] == pytest.approx(100 * sum(accuracy) / 3, rel=1e-12)
    assert found_scores["aacc"] == pytest.approx(100 * (labels == found).mean(), rel=1e-12)


def test_counts_beyond_32_bits_are_exact():
    matrix = np.array([[2**40 + 1, 1], [0, 2**40]])
    assert scores_of(matrix)["aacc"] == 100 * (2**41 + 1) / (2**41 + 2)


class Given(nn.Module):
    """A network that knows the classes: logits of a quarter of the image's sides, from the image's red value / 10."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        classes = (images[:, 0, ::4, ::4] / 10).round().long()
        return nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()


def tally_of(segment_config, *settings: str) -> SegmentationTally:
    plain = ["augment.mean=[0,0,0]", "augment.std=[0.00392156862745098,0.00392156862745098,0.00392156862745098]"]
    config = load_config(segment_config, [*plain, "task.test_scale=[32,32]", *settings])
    return SegmentationTally(config, ["a", "b", "c"], torch.device("cpu"))


def batch(ids: list[int], labels: torch.Tensor, counted: list[bool]) -> MicroBatch:
    images = (10 * labels.clamp(max=2)[:, None].expand(-1, 3, -1, -1)).byte()
    return MicroBatch(0, 0, torch.tensor(ids), np.array(ids), images, torch.tensor(counted), {"labels": labels})


def blocks(count: int) -> torch.Tensor:
    """Labels of 32 x 32 pixels in blocks of 8, which bilinear interpolation of quarter-size logits keeps inside."""
    random = torch.Generator().manual_seed(0)
    small = torch.randint(0, 3, (count, 4, 4), generator=random, dtype=torch.uint8)
    return small.repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_uncounted_and_unlabelled_pixels_do_not_count(segment_config):
    tally, labels = tally_of(segment_config), blocks(3)
    labels[0, :, :16] = 255
    assert tally.add(Given(), batch([4, 5, 6], labels, [True, False, True])).tolist() == [2.0]
    scores, details = tally.finish([2.0])
    assert sum(details["labelled"]) == 32 * 16 + 32 * 32 and scores.count == 2
    counts = np.bincount(np.concatenate([labels[0].flatten(), labels[2].flatten()]), minlength=256)
    assert details["labelled"] == counts[:3].tolist()
    assert [picture["id"] for picture in details["pictures"]] == [4, 6]


def test_a_perfect_network_is_found_perfect(segment_config):
    tally = tally_of(segment_config)
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[1] = 2
    tally.add(Given(), batch([0, 1], labels, [True, True]))
    scores, details = tally.finish([2.0])
    assert scores.values == {"miou": 100.0, "macc": 100.0, "aacc": 100.0}  # class b occurs nowhere
    assert details["correct"] == details["labelled"] == details["predicted"] == [1024, 0, 1024]


def test_the_same_pictures_are_kept_in_whatever_batches_they_come(segment_config):
    labels, ids = blocks(20), list(range(20))
    kept = []
    for size, starts in ((1, range(19, -1, -1)), (7, (14, 0, 7)), (20, (0,))):
        tally = tally_of(segment_config)
        for start in starts:
            part = slice(start, start + size)
            tally.add(Given(), batch(ids[part], labels[part], [True] * len(ids[part])))
        kept.append(tally.finish([20.0])[1]["pictures"])
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == KEPT
    assert [shown["id"] for shown in kept[0]] == sorted(shown["id"] for shown in kept[0])
    assert max(shown["id"] for shown in kept[0]) > 9 > min(shown["id"] for shown in kept[0])
    for shown in kept[0]:
        assert np.array_equal(from_base64(shown["labels"]), paint(labels[shown["id"]].numpy(), 3))


def test_pictures_are_reduced_and_keep_their_aspect(segment_config):
    tally = tally_of(segment_config)
    tally.add(Given(), batch([0], torch.zeros(1, 200, 768, dtype=torch.uint8), [True]))
    (shown,) = tally.finish([1.0])[1]["pictures"]
    assert {from_base64(shown[part]).shape for part in ("image", "labels", "prediction")} == {(100, 384, 3)}


def test_a_split_without_a_labelled_pixel_is_named(segment_config):
    tally = tally_of(segment_config)
    tally.add(Given(), batch([0], torch.full((1, 32, 32), 255, dtype=torch.uint8), [True]))
    with pytest.raises(DataError, match="not one pixel of the val split that can be read has a class"):
        tally.finish([1.0])
