"""The format of checkpoints: a folder `step_%08d` of safetensors shards and a manifest with their hashes.

Each rank writes its share of the state to `shard_%05d.safetensors` as flat pieces named `<kind>/<parameter>`; the index
of each piece's first element is in the file's metadata ("starts"). Kinds are:

- `model` (fp32 weights), `ema` and the optimizer's moments (`exp_avg`, …), of which every rank writes its fragments;
- `buffer` and `ema_buffer`, which rank 0 writes whole.

As every piece has its position, the format does not depend on world size or ZeRO stage. There is no random state to
save: random numbers are functions of the seed and the step.

A checkpoint is written into a temporary folder: first the shards, then `manifest.json`, each flushed to the disk. Then
the folder is renamed (`commit`). So a folder with a checkpoint's name is complete.
"""

import json
import os
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.durable import fsync, publish, sha256_of
from data_pipeline.faults import LASTING, StorageError, retried
from data_pipeline.manifest import Manifest
from train.checkpoint.info import CheckpointError, CheckpointInfo, read_info
from train.checkpoint.pieces import Wanted, fill, pieces_of
from train.config import Config
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.telemetry.metrics import Metric
from train.telemetry.start_message import program_versions


def describe(
    step: int,
    config: Config,
    manifest: Manifest,
    metric: Metric,
    engine: Engine,
    steps_per_epoch: int,
    began: str | None,
) -> CheckpointInfo:
    """The manifest's fields shared by all checkpoints of this start of the run, which begins after `step` steps."""
    return CheckpointInfo(
        step=step,
        score=None,
        metric=metric.name,
        better=metric.better,
        dataset=manifest.split("train").identity,
        classes=list(manifest.classes),
        config=config.model_dump(mode="json"),
        optimizer_step=0,
        loss_scale={},
        shapes={name: list(shape) for name, shape in engine.shapes.items()},
        versions=program_versions(),
        world_size=engine.world,
        steps_per_epoch=steps_per_epoch,
        began=began,
    )


def write_shard(path: Path, tensors: dict[str, torch.Tensor], starts: dict[str, int]) -> str:
    """Write one rank's share and flush it to the disk. Returns the SHA-256 of the file as read back.

    tensors: on the host, by `<kind>/<parameter>`. starts: the index of each flat piece's first element.
    """
    _save_file(tensors, path, {"starts": json.dumps(starts)})
    fsync(path)
    return sha256_of(path)


def _save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # raised for the disk's errors, too
        raise OSError(str(error)) from error
    # safetensors makes files readable by their owner only. Reading the umask by os.umask would change it for other
    # threads.
    umask = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")
    ).split()[1]
    path.chmod(0o666 & ~int(umask, 8))


def commit(temporary: Path, final: Path) -> None:
    """Rename the folder of a complete checkpoint to its final name.

    If there is a checkpoint of that name (the step was taken again), it is renamed to `.replaced`, which `prune`
    removes.
    """
    replaced = temporary.with_suffix(".replaced")
    if there := final.exists():
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if there:
            os.rename(replaced, final)
        raise
    fsync(final.parent)


def load_checkpoint(path: Path, info: CheckpointInfo, engine: Engine, ema: Ema | None) -> None:
    """Load this rank's weights, moments, averages and buffers, and publish the weights to the model.

    All ranks call this. Raises CheckpointError if the checkpoint is of another model, or lacks parts (EMA, the
    optimizer's moments).
    """
    shapes = {name: tuple(shape) for name, shape in info.shapes.items()}
    if shapes != engine.shapes:
        differing = sorted(
            name for name in shapes.keys() | engine.shapes if shapes.get(name) != engine.shapes.get(name)
        )
        raise CheckpointError(
            f"{path} is of another model: {differing[0]} is {shapes.get(differing[0])} there"
            f" and {engine.shapes.get(differing[0])} here"
            + (f" (and {len(differing) - 1} more)" if len(differing) > 1 else "")
        )
    wanted = [
        Wanted(f"{kind}/{fragment.name}", fragment.start, target)
        for fragment in engine.fragments(everything=True)
        for kind, target in {"model": fragment.master, **fragment.moments}.items()
    ]
    whole = {f"buffer/{name}": buffer for name, buffer in engine.whole().items()}
    if ema is not None:
        wanted += [
            Wanted(f"ema/{fragment.name}", fragment.start, average)
            for fragment, average in zip(ema.fragments, ema.averages, strict=False)
        ]
        whole |= {f"ema_buffer/{name}": average for name, average in ema.buffers.items()}
    read = {key: torch.empty_like(buffer, memory_format=torch.contiguous_format) for key, buffer in whole.items()}
    fill(
        nearest_first(path, info, engine.rank, engine.world),
        wanted + [Wanted(key, 0, buffer.view(-1)) for key, buffer in read.items()],
    )
    for key, buffer in whole.items():
        buffer.copy_(read[key])
    engine.set_optimizer_step_count(info.optimizer_step)
    known = engine.loss_scale_state()
    engine.set_loss_scale_state({key: value for key, value in info.loss_scale.items() if key in known})
    engine.publish()


def nearest_first(path: Path, info: CheckpointInfo, rank: int = 0, world: int = 1) -> list[Path]:
    """The shards of a checkpoint in the order in which rank `rank` of `world` should read them.

    First the shard at the rank's relative position, then shard 0, which has the buffers, then the others by distance.
    With unchanged world size a rank finds its share in the first two, and opens no others.
    """
    names = sorted(info.shards)
    own = rank * len(names) // world
    order = sorted(range(len(names)), key=lambda index: (index != own, index != 0, abs(index - own)))
    return [path / names[index] for index in order]


def read_weights(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The whole state dict of a checkpoint in fp32, assembled from its shards; `kind` is "ema" or "model".

    Needs no process group. Raises CheckpointError or StorageError.
    """
    info = read_info(path)
    shards = nearest_first(path, info)
    pieces = pieces_of(shards)
    state, wanted = {}, []
    for name, shape in info.shapes.items():
        there = sum(piece.numel for piece in pieces.get(f"{kind}/{name}", []))
        if there != prod(shape):  # before allocating: an untrusted manifest may claim any size
            raise CheckpointError(f"{path}: {kind}/{name} has {there} of the {prod(shape)} elements of its shape")
        state[name] = torch.empty(shape)
        wanted.append(Wanted(f"{kind}/{name}", 0, state[name].view(-1)))
    for prefix in ("buffer/", "ema_buffer/") if kind == "ema" else ("buffer/",):  # integers are not averaged
        for key, (piece, *_) in pieces.items():
            if key.startswith(prefix):
                buffer = state[key.removeprefix(prefix)] = torch.empty(piece.shape, dtype=piece.dtype)
                wanted.append(Wanted(key, 0, buffer.view(-1)))
    fill(shards, wanted)
    return state


def write_final_weights(output: Path, path: Path, kind: str) -> None:
    """Write `output/model.safetensors`, the whole state dict of checkpoint `path`; `kind` is as in `read_weights`.

    One rank calls this. Raises StorageError if the checkpoint cannot be read or the file not be written.
    """
    info = read_info(path)
    sections = {key: info.config.get(key, {}) for key in ("model", "task")}  # the oldest checkpoints have no task
    about = {**sections, "classes": info.classes, "step": info.step}
    state, final = read_weights(path, kind), output / "model.safetensors"
    temporary = final.with_name(f"{final.name}.tmp")

    def write() -> None:
        _save_file(state, temporary, {"catmodel": json.dumps(about)})
        publish(temporary, final)

    try:
        retried(write, str(final))
    except (StorageError, *LASTING) as error:
        raise StorageError(
            f"{final} cannot be written ({error.__cause__ or error}); the run's last checkpoint is whole: start again"
        ) from error
