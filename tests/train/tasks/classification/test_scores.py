"""The tally of classification against plain computations, on given outputs of a network."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.config import AugmentConfig
from data_pipeline.loader import MicroBatch
from data_pipeline.split import DataError
from train.tasks.classification.scores import KEPT, ClassificationTally

CPU = torch.device("cpu")


def scored(logits: Tensor, labels: Tensor, counted: Tensor, size: int = 16):
    """The scores and details of samples 0 …, in batches of `size`."""
    tally = ClassificationTally(AugmentConfig(), [f"class {number}" for number in range(logits.shape[1])], CPU)
    sums = torch.zeros(tally.width, dtype=torch.float64)
    for ids in torch.arange(len(logits)).split(size):
        images = torch.zeros(len(ids), 3, 2, 2, dtype=torch.uint8)
        batch = MicroBatch(0, 0, ids, ids.numpy(), images, counted[ids], labels[ids])
        sums += tally.add(lambda images, ids=ids: logits[ids].bfloat16(), batch)
    return tally.finish(sums.tolist())


@pytest.mark.parametrize("classes", [3, 10])
def test_scores_and_counts_are_those_of_a_plain_computation(classes):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(90, classes).bfloat16().float(), torch.randint(0, classes, (90,))
    counted = torch.rand(90) < 0.8
    scores, details = scored(logits, labels, counted)
    exact, truth = logits[counted].double(), labels[counted]
    places = (exact > exact.gather(1, truth[:, None])).sum(1)  # how many classes are more probable
    assert 0 < (places == 0).sum() < (places < 5).sum()
    assert scores.count == counted.sum() == len(truth) < 90
    assert scores.values == {
        "top1": pytest.approx(100 * (places == 0).double().mean().item()),
        "top5": pytest.approx(100 * (places < 5).double().mean().item()),
        "loss": pytest.approx(-exact.log_softmax(1).gather(1, truth[:, None]).mean().item(), rel=1e-6),
    }
    assert details["count"] == torch.bincount(truth, minlength=classes).tolist()
    assert details["correct"] == torch.bincount(truth[places == 0], minlength=classes).tolist()


def test_mistakes_are_the_surest_first_and_equal_ones_by_their_ids():
    """Whatever the batches; neither right answers, nor samples that do not count, nor outputs that are not numbers."""
    logits, labels = torch.zeros(100, 4), torch.zeros(100, dtype=torch.int64)
    logits[:, 1] = torch.arange(100) // 3 / 4  # wrong; of three equal ones the smallest id comes first
    labels[90:], logits[99] = 1, torch.nan
    counted = torch.arange(100) % 10 != 7
    expected = [number for top in range(87, -3, -3) for number in range(top, top + 3) if number % 10 != 7][:KEPT]
    for size in (100, 16, 7):
        mistakes = scored(logits, labels, counted, size)[1]["mistakes"]
        assert [mistake["id"] for mistake in mistakes] == expected
        assert {(mistake["label"], mistake["predicted"]) for mistake in mistakes} == {(0, 1)}
        found = [mistake["probability"] for mistake in mistakes]
        assert np.allclose(found, logits[expected].softmax(1)[:, 1], atol=1e-6)


def test_a_split_of_which_no_image_can_be_read_is_named():
    with pytest.raises(DataError, match="not one image of the val split can be read"):
        scored(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
