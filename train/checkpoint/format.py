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
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.config import has_secret, without_secrets
from data_pipeline.durable import fsync, publish, sha256_of
from data_pipeline.faults import LASTING, StorageError, retried
from data_pipeline.manifest import Manifest
from train.checkpoint.pieces import CheckpointError, Wanted, fill, pieces_of
from train.config import Config
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.telemetry.metrics import LARGEST, Metric
from train.telemetry.start_message import program_versions

MANIFEST = "manifest.json"
VERSION = 2  # 1 had "top1" in place of "score", and classification alone
LARGEST_MANIFEST = 256 << 20  # bytes

Score = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
ShardName = Annotated[str, Field(pattern=r"^shard_[0-9]{5,}\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class CheckpointInfo:
    """The manifest of a checkpoint: the step, the run's settings, and the hashes of the shards."""

    step: Count
    score: Score | None  # primary metric at this step, of the EMA if there is one; None: not evaluated
    dataset: str  # Split.identity of the training split
    classes: list[str]
    config: dict[str, Any]
    optimizer_step: Count
    loss_scale: dict[str, bool | int | Annotated[float, Field(allow_inf_nan=False)]]
    shapes: dict[str, list[Count]]
    versions: dict[str, str]  # as returned by program_versions
    world_size: Count
    shards: dict[ShardName, Sha256] = field(default_factory=dict)
    version: int = VERSION
    steps_per_epoch: Count = 0  # 0: not known (checkpoints written before this field existed)
    metric: str = "top1"  # name of the score's metric
    better: Literal["higher", "lower"] = "higher"
    began: str | None = None  # the checkpoint named by `--resume` where this sequence of steps began: Resume.name_of

    @property
    def merit(self) -> float | None:
        """The score with its sign chosen such that larger is better."""
        return self.score if self.score is None or self.better == "higher" else -self.score


_INFO = TypeAdapter(CheckpointInfo)


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


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of step `step` in `folder`."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


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


def write_manifest(folder: Path, info: CheckpointInfo) -> None:
    """Write the manifest into `folder`, which has all shards, and flush it and the folder to the disk."""
    path = folder / MANIFEST
    path.write_text(json.dumps(asdict(info), indent=1))
    fsync(path)
    fsync(folder)


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


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in `folder`, newest first, without validation."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def read_info(path: Path) -> CheckpointInfo:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing or damaged, StorageError if reading fails.

    Reading is retried for a while first: see data_pipeline.faults.
    """
    return retried(lambda: read_info_once(path), str(path / MANIFEST))


def read_info_once(path: Path) -> CheckpointInfo:
    """As read_info, but without retrying: a fault of the file system that may be temporary is raised as OSError."""
    file = path / MANIFEST
    try:
        if not file.is_file() and file.exists():
            raise CheckpointError(f"{file} is no file")
        if file.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{file} is damaged: no manifest is that large")
        document = json.loads(file.read_bytes())
        version = document["version"]
        if version not in (1, VERSION):
            raise CheckpointError(f"{path} has format version {version!r}, this program reads versions 1 and {VERSION}")
        if version == 1:
            document["score"] = document.pop("top1")
        info = _INFO.validate_json(json.dumps(document), strict=True)
        data = info.config["data"]
        if has_secret(data["path"]):  # checkpoints from before November 2026 may contain secrets
            data["path"] = without_secrets(data["path"])
        return info
    except LASTING as error:
        raise CheckpointError(f"{path} is not a checkpoint: {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file} is damaged ({where}: {first['msg']})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error


def validate(path: Path) -> CheckpointInfo:
    """Read the manifest and compare every file with its hash, on all cores. Raises the same errors as read_info."""
    info = read_info(path)

    def check(name: str) -> None:
        file = path / name
        if not retried(file.is_file, str(file)):
            raise CheckpointError(f"{file} is missing")
        if retried(lambda: sha256_of(file), str(file)) != info.shards[name]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the manifest's")

    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="hash")
    try:
        list(threads.map(check, info.shards))  # hashlib releases the GIL
    except LASTING as error:
        raise CheckpointError(f"{path} cannot be read: {error.filename}: {error.strerror}") from error
    finally:
        threads.shutdown(cancel_futures=True)
    return info


def first_sound(candidates: Iterable[Path]) -> tuple[Path | None, CheckpointInfo | None, list[str]]:
    """The first of the candidates that is valid, and its manifest, or (None, None); and why those before it are not."""
    skipped = []
    for path in candidates:
        try:
            return path, validate(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, None, skipped


def evaluated(folder: Path, until: int | None = None) -> list[tuple[Path, float]]:
    """The evaluated checkpoints up to step `until` with their scores, best first; of equal ones the earliest first."""
    found = []
    for path in list_checkpoints(folder):
        try:
            info = read_info(path)
        except CheckpointError:
            continue  # damaged, so its score is of no use
        if info.score is not None and (until is None or info.step <= until):
            found.append((path, info))
    return [(path, info.score) for path, info in sorted(found, key=lambda pair: (-pair[1].merit, step_of(pair[0])))]


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
    names = sorted(info.shards, key=lambda name: (len(name), name))
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
