"""What a broken run is compared with: all tensors of a checkpoint, and the sample ids of every step."""

import json

import torch

from tests.runs import metrics
from train.checkpoint.format import checkpoint_path, read_info
from train.checkpoint.pieces import Wanted, fill, pieces_of


def state(output, step, kinds=("model", "ema", "exp_avg", "exp_avg_sq")) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights, EMA, moments."""
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


def ids_by_step(output, world) -> dict[int, list[int]]:
    """Sample ids of every step over all ranks; where a step was taken twice, the second time counts."""
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        lines = [json.loads(line) for line in (output / "samples" / f"rank_{rank}.jsonl").read_text().splitlines()]
        for step, ids in {line["step"]: line["ids"] for line in lines}.items():
            steps.setdefault(step, []).extend(ids)
    return steps


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:5]}"


def scores(output) -> dict[tuple[int, str], list[float]]:
    """(step, weights) → top-1, top-5, loss and count."""
    return {
        (line["step"], line["weights"]): [line[key] for key in ("top1", "top5", "loss", "count")]
        for line in metrics(output, "eval")
    }
