"""Accuracy and loss of a classifier, per class counts, and the mistakes it was surest of."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.augment import normalise
from data_pipeline.config import AugmentConfig
from data_pipeline.loader import MicroBatch
from data_pipeline.split import DataError
from train.tasks.base import Model, on_device
from train.telemetry.metrics import Scores

KEPT = 32  # mistakes
UNCOUNTED = -1  # label of samples that are not counted


@dataclass(frozen=True)
class Mistake:
    """A sample of the `val` split, its class, and the class that the model found more probable, with its probability
    0..1.
    """

    id: int
    label: int
    predicted: int
    probability: float


class ClassificationTally:
    """Sums of a batch: correct in the first place, correct in the first five, cross-entropy, samples.

    Kept for launch/report.py: for each class how many of its samples were scored and how many of those correctly; and
    the mistakes that the model was surest of, surest first, equally sure ones by their ids. All of that is integers on
    the device, so no order of adding changes it, and the host does not wait before `finish`.
    """

    width = 4

    def __init__(self, settings: AugmentConfig, classes: Sequence[str], device: torch.device):
        self._settings, self._classes, self._device = settings, classes, device
        # (scored, correct) by class; the last row is for UNCOUNTED
        self._counts = torch.zeros(len(classes) + 1, 2, dtype=torch.int64, device=device)
        self._worst = torch.full((4, KEPT), -1, dtype=torch.int64, device=device)  # key, id, label, predicted

    def add(self, model: Model, batch: MicroBatch) -> Tensor:
        ids, labels, counted = (
            column.to(self._device, non_blocking=True) for column in (batch.ids, batch.targets, batch.counted)
        )
        labels = labels.where(counted, UNCOUNTED)
        logits = model(normalise(on_device(batch, self._device), self._settings)).float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=UNCOUNTED)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        ranked = best == labels[:, None]  # never for UNCOUNTED
        self._add_details(ids, labels, best[:, 0], logits)
        return torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum(), losses.double().sum(), counted.sum()])

    def finish(self, sums: Sequence[float]) -> tuple[Scores, dict]:
        correct1, correct5, loss, count = sums
        total = int(count)
        if not total:
            raise DataError(
                "not one image of the val split can be read. Check the dataset with: python launch/prepare.py verify "
                "DATASET"
            )
        values = {"top1": 100 * correct1 / total, "top5": 100 * correct5 / total, "loss": loss / total}
        return Scores(values, total), self._gather()

    def _add_details(self, ids: Tensor, labels: Tensor, predicted: Tensor, logits: Tensor) -> None:
        counted, correct = labels != UNCOUNTED, predicted == labels
        rows = labels.where(counted, len(self._classes))
        self._counts.index_add_(0, rows, torch.stack([counted, correct], dim=1).long())
        probability = logits.softmax(dim=1).amax(dim=1).nan_to_num(0.0)
        # The bits of floats that are not negative are ordered like the floats. With the id below them no two keys are
        # equal.
        key = probability.view(torch.int32).long() << 32 | (0xFFFFFFFF - ids)
        self._keep(torch.stack([key.where(counted & ~correct, -1), ids, labels, predicted]))

    def _keep(self, found: Tensor) -> None:
        together = torch.cat([self._worst, found], dim=1)
        self._worst = together[:, together[0].topk(KEPT).indices]

    def _gather(self) -> dict:
        """The counts and mistakes of all ranks, on all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self._counts)
            of_all = [torch.empty_like(self._worst) for _ in range(dist.get_world_size())]
            dist.all_gather(of_all, self._worst)
            self._worst.fill_(-1)
            self._keep(torch.cat(of_all, dim=1))
        worst = self._worst[:, self._worst[0] >= 0].cpu()
        probabilities = (worst[0] >> 32).int().view(torch.float32).tolist()
        mistakes = [
            Mistake(*row, probability) for row, probability in zip(worst[1:].T.tolist(), probabilities, strict=True)
        ]
        count, correct = self._counts[:-1].T.tolist()
        return {
            "classes": list(self._classes),
            "count": count,
            "correct": correct,
            "mistakes": [asdict(mistake) for mistake in mistakes],
        }
