"""State of a run to compare with another run: the tensors of a checkpoint, and the sample ids of every step; and a
step's loss by hand.
"""

import json
from pathlib import Path

import torch

from data_pipeline.order import Order
from data_pipeline.randomness import Stream, make_key
from data_pipeline.storage import open_dataset
from tests.runs import metrics
from train.checkpoint.info import checkpoint_path, read_info
from train.checkpoint.pieces import Wanted, fill, pieces_of
from train.config import load_config
from train.tasks.base import build_task, training_batches


def state(
    output: Path, step: int, kinds: tuple[str, ...] = ("model", "ema", "exp_avg", "exp_avg_sq")
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, EMA, moments."""
    path = checkpoint_path(output / "checkpoints", step)
    info = read_info(path)
    shards = [path / name for name in sorted(info.shards)]
    there = pieces_of(shards)
    places = [
        (f"{kind}/{name}", shape) for kind in kinds for name, shape in info.shapes.items() if f"{kind}/{name}" in there
    ]
    tensors = {key: torch.empty(shape) for key, shape in places}
    fill(shards, [Wanted(key, 0, tensor.view(-1)) for key, tensor in tensors.items()])
    return {"optimizer_step": torch.tensor(info.optimizer_step), **tensors}


def ids_by_step(output: Path, world: int, folder: str = "samples") -> dict[int, list[int]]:
    """Sample ids of every step, rank by rank. For a step that was computed twice, those of the second time."""
    steps: dict[int, dict[int, list[int]]] = {}
    for rank in range(world):
        text = (output / folder / f"rank_{rank}.jsonl").read_text()
        complete = text[: text.rfind("\n") + 1].splitlines()  # the last line of a killed run may be incomplete
        for line in map(json.loads, complete):
            steps.setdefault(line["step"], {})[rank] = line["ids"]
    return {step: sum((ranks[rank] for rank in sorted(ranks)), []) for step, ranks in steps.items()}


def sorted_ids_by_step(output: Path, world: int, folder: str = "samples") -> dict[int, list[int]]:
    """`ids_by_step` with the ids of a step sorted, which is the same on any number of ranks."""
    return {step: sorted(ids) for step, ids in ids_by_step(output, world, folder).items()}


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:5]}"


def scores(output: Path) -> dict[tuple[int, str], list[float]]:
    """(step, weights) → top-1, top-5, loss and count."""
    return {
        (line["step"], line["weights"]): [line[key] for key in ("top1", "top5", "loss", "count")]
        for line in metrics(output, "eval")
    }


@torch.no_grad()
def loss_by_hand(config: Path, settings: list[str], weights: dict[str, torch.Tensor], step: int) -> float:
    """The loss of the step that follows `step` finished ones, for a model with these weights (the others are as
    initialised) and on one rank: the micro-batches one after the other, without an engine.
    """
    config = load_config(config, settings)
    manifest = open_dataset(config.data)
    train, split = config.train, manifest.split("train")
    order = Order(train.seed, split.samples, train.global_batch, train.micro_batch)
    task = build_task(config, manifest.classes)
    model = task.initial_model()
    model.load_state_dict(model.state_dict() | weights)
    total = 0.0
    with training_batches(task, split, order, 0, 1, step) as batches:
        for index in range(order.micro_batches):
            inputs = task.inputs(next(batches), step // (split.samples // train.global_batch), torch.device("cpu"))
            torch.manual_seed(make_key(train.seed, Stream.MODEL, step, index))
            total += task.loss(model, inputs)["loss"].item()
    return total / order.micro_batches
