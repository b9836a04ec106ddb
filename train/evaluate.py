"""Distributed evaluation that counts every sample exactly once, and gives the same numbers to the last bit on any number of ranks.

Batches are fixed slices of the ids, so a sample is computed in the same company whoever computes it; each batch's sums go into a slot of
their own, and slots are added in one order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import UNCOUNTED
from data_pipeline.manifest import DataError


@dataclass(frozen=True)
class Scores:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of samples they are of."""

    top1: float
    top5: float
    loss: float
    count: int


def evaluate(model: Callable[[Tensor], Tensor], batches: Iterable, batch_count: int, device: torch.device) -> Scores:
    """Score `model` (normalised images → logits [m, classes]) on this rank's share of `batches`; all ranks must call, all get the result.

    `batches` yields (slot, images float [m, 3, S, S], labels [m]). UNCOUNTED is what only keeps ranks in step, or could not be read.
    """
    sums = torch.zeros(batch_count, 4, dtype=torch.float64, device=device)
    for slot, images, labels in batches:
        logits = model(images).float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=UNCOUNTED)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # never, for UNCOUNTED
        counted = (labels != UNCOUNTED).sum()
        sums[slot] += torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum(), losses.double().sum(), counted])
    if dist.is_initialized():
        dist.all_reduce(sums)  # every slot is zero on all ranks but one: exact
    correct1, correct5, loss, count = (column.cpu().tolist() for column in sums.unbind(1))
    total = int(sum(count))
    if not total:
        raise DataError("not one image of the val split can be read. Check the dataset with: python launch/prepare.py verify DATASET")
    return Scores(100 * sum(correct1) / total, 100 * sum(correct5) / total, sum(loss) / total, total)
