"""Distributed evaluation that counts every sample exactly once, and gives the same numbers to the last bit on any number of ranks.

Batches are fixed slices of the ids, so a sample is computed in the same company whoever computes it; each batch's sums go into a slot of
their own, and slots are added in one order.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import UNCOUNTED
from data_pipeline.manifest import DataError

KEPT = 32  # mistakes


@dataclass(frozen=True)
class Scores:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of samples they are of."""

    top1: float
    top5: float
    loss: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """The newest evaluation of a run: Scores of the weights "model" and, where there is an EMA, "ema", after `step` steps."""

    step: int = -1  # none yet
    scores: dict[str, Scores] = field(default_factory=dict)

    def top1(self, step: int) -> float | None:
        """Percent, after `step` steps: the EMA's, where there is one. None where this is of another step."""
        return (self.scores.get("ema") or self.scores["model"]).top1 if self.step == step else None


@dataclass(frozen=True)
class Mistake:
    """A sample of the `val` split, its class, and the one that the model found more probable, with its probability 0..1."""

    id: int
    label: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Details:
    """What launch/report.py shows beside the scores: for each class how many of its samples were scored and how many of those correctly;
    and the mistakes that the model was surest of, surest first, those equally sure by their ids."""

    count: list[int]
    correct: list[int]
    mistakes: list[Mistake]


def evaluate(
    model: Callable[[Tensor], Tensor], batches: Iterable, batch_count: int, classes: int, device: torch.device
) -> tuple[Scores, Details]:
    """Score `model` (normalised images → logits [m, classes]) on this rank's share of `batches`; all ranks must call, all get the result.

    `batches` yields (slot, ids [m], images float [m, 3, S, S], labels [m]). UNCOUNTED is what only keeps ranks in step, or could not be
    read.
    """
    sums = torch.zeros(batch_count, 4, dtype=torch.float64, device=device)
    tally = _Tally(classes, device)
    for slot, ids, images, labels in batches:
        logits = model(images).float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=UNCOUNTED)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        ranked = best == labels[:, None]  # never, for UNCOUNTED
        counted = (labels != UNCOUNTED).sum()
        sums[slot] += torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum(), losses.double().sum(), counted])
        tally.add(ids, labels, best[:, 0], logits)
    if dist.is_initialized():
        dist.all_reduce(sums)  # every slot is zero on all ranks but one: exact
    correct1, correct5, loss, count = (column.cpu().tolist() for column in sums.unbind(1))
    total = int(sum(count))
    if not total:
        raise DataError("not one image of the val split can be read. Check the dataset with: python launch/prepare.py verify DATASET")
    return Scores(100 * sum(correct1) / total, 100 * sum(correct5) / total, sum(loss) / total, total), tally.gather()


class _Tally:
    """Details on the device, without a word to the host until `gather`. All of it is integers, so no order of adding changes it."""

    def __init__(self, classes: int, device: torch.device):
        self._classes = classes
        self._counts = torch.zeros(classes + 1, 2, dtype=torch.int64, device=device)  # (scored, correct); the last row is of UNCOUNTED
        self._worst = torch.full((4, KEPT), -1, dtype=torch.int64, device=device)  # key, id, label, predicted

    def add(self, ids: Tensor, labels: Tensor, predicted: Tensor, logits: Tensor) -> None:
        counted, correct = labels != UNCOUNTED, predicted == labels
        self._counts.index_add_(0, labels.where(counted, self._classes), torch.stack([counted, correct], dim=1).long())
        probability = logits.softmax(dim=1).amax(dim=1).nan_to_num(0.0)
        # Floats that are not negative are in the order of their bits. With the id behind them no two keys are equal: there is one result.
        key = probability.view(torch.int32).long() << 32 | (0xFFFFFFFF - ids)
        self._keep(torch.stack([key.where(counted & ~correct, -1), ids, labels, predicted]))

    def _keep(self, found: Tensor) -> None:
        together = torch.cat([self._worst, found], dim=1)
        self._worst = together[:, together[0].topk(KEPT).indices]

    def gather(self) -> Details:
        """Of all ranks, to all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self._counts)
            everybody = [torch.empty_like(self._worst) for _ in range(dist.get_world_size())]
            dist.all_gather(everybody, self._worst)
            self._worst.fill_(-1)
            self._keep(torch.cat(everybody, dim=1))
        worst = self._worst[:, self._worst[0] >= 0].cpu()
        probabilities = (worst[0] >> 32).int().view(torch.float32).tolist()
        mistakes = [Mistake(*row, probability) for row, probability in zip(worst[1:].T.tolist(), probabilities, strict=True)]
        count, correct = self._counts[:-1].T.tolist()
        return Details(count, correct, mistakes)


def write_details(path: Path, step: int, classes: Iterable[str], fingerprint: str, details: Details) -> None:
    """Write the evaluation after `step` steps, of the split with that fingerprint, to `path` in place of the one before it.

    A disk that is full does not end training: it is said on stderr.
    """
    text = json.dumps({"step": step, "classes": list(classes), "split": fingerprint, **asdict(details)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
            sentence = f"alarm: {path} cannot be written ({error.strerror}): a report will not show the classes and mistakes of step {step}"
            print(sentence, file=sys.stderr, flush=True)
