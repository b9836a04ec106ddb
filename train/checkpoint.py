"""Checkpoints: a folder `step_%08d` of safetensors shards and a hashed manifest, committed by one rename.

Every rank writes its share in `shard_%05d.safetensors`: flat pieces named `<kind>/<parameter>`, with the first element of each piece
in the file's metadata. Kinds are `model` (fp32 weights), `ema`, the optimizer's moments (`exp_avg`, …), `buffer` and `ema_buffer`, both
whole and written by rank 0. Pieces carry their position, so nothing in the layout depends on world size or ZeRO stage. There is no
random state to save: position is the state.
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_pipeline.config import has_secret, without_secrets
from data_pipeline.manifest import Manifest, fsync, sha256_of
from train.config import Config, ConfigError
from train.ema import Ema
from train.engine import Engine
from train.runtime import program_versions

MANIFEST = "manifest.json"
VERSION = 1


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's manifest: where training was, what it was, and what its files must be."""

    step: int
    top1: float | None  # percent, of the evaluation at this very step: EMA's where there is one
    dataset: str  # fingerprint of the training split
    classes: list[str]
    config: dict
    optimizer_step: int
    loss_scale: dict[str, float]
    shapes: dict[str, list[int]]
    versions: dict[str, str]  # of python, torch and deepspeed, and the git commit of this program ("" outside a checkout)
    world_size: int
    shards: dict[str, str] = field(default_factory=dict)  # file name → SHA-256
    version: int = VERSION


def describe(step: int, config: Config, manifest: Manifest, engine: Engine) -> CheckpointInfo:
    """The parts of a checkpoint's manifest that are the same for all checkpoints of a start of a run, which begins after `step` steps."""
    return CheckpointInfo(
        step=step,
        top1=None,
        dataset=manifest.split("train").fingerprint,
        classes=list(manifest.classes),
        config=config.model_dump(mode="json"),
        optimizer_step=0,
        loss_scale={},
        shapes={name: list(shape) for name, shape in engine.shapes.items()},
        versions=program_versions(),
        world_size=engine.world,
    )


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def write_shard(path: Path, tensors: dict[str, torch.Tensor], starts: dict[str, int]) -> str:
    """Write one rank's share: `tensors` on the host, and each flat piece's first element. Returns the SHA-256 of what is on the disk."""
    _save_file(tensors, path, {"starts": json.dumps(starts)})
    fsync(path)
    return sha256_of(path)


def _save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata)
    # safetensors makes its files readable by their owner alone. Asking os.umask would change it for other threads.
    umask = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")).split()[1]
    path.chmod(0o666 & ~int(umask, 8))


def write_manifest(folder: Path, info: CheckpointInfo) -> None:
    """Write the manifest into `folder`, whose shards are all there. All of it is on the disk when this returns."""
    path = folder / MANIFEST
    path.write_text(json.dumps(asdict(info), indent=1))
    fsync(path)
    fsync(folder)


def commit(temporary: Path, final: Path) -> None:
    """Give a checkpoint that is complete on the disk its name. One that has the name already (the step was taken again) is replaced."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Undo what a run that was killed while it saved has left in `folder`. One rank calls this, before any save."""
    for replaced in folder.glob(".step_*.replaced"):
        final = folder / replaced.name[1:].removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)  # killed between the two renames
    for temporary in folder.glob(".step_*.tmp"):
        shutil.rmtree(temporary)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in `folder`, newest first; not yet validated."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def read_info(path: Path) -> CheckpointInfo:
    """A checkpoint's manifest. Raises CheckpointError where it is missing or damaged."""
    try:
        document = json.loads((path / MANIFEST).read_text())
        if document["version"] != VERSION:
            raise CheckpointError(f"{path} has format version {document['version']}, this program reads version {VERSION}")
        data = document["config"]["data"]
        if has_secret(data["path"]):  # as checkpoints of before November 2026 may have it
            data["path"] = without_secrets(data["path"])
        return CheckpointInfo(**document)
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error})") from error


def validate(path: Path) -> CheckpointInfo:
    """Read the manifest and compare every file with its hash. Raises CheckpointError."""
    info = read_info(path)
    for name, expected in info.shards.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        if sha256_of(path / name) != expected:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the manifest's")
    return info


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all sound, or None; and a sentence for each newer one that is not."""
    skipped = []
    for path in list_checkpoints(folder):
        try:
            validate(path)
            return path, skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load_checkpoint(path: Path, info: CheckpointInfo, engine: Engine, ema: Ema | None) -> None:
    """Fill this rank's weights, moments and averages, and publish the weights to the model.

    Raises CheckpointError where the checkpoint is of another model, or lacks something (EMA, the optimizer's moments).
    """
    shapes = {name: tuple(shape) for name, shape in info.shapes.items()}
    if shapes != engine.shapes:
        differing = sorted(name for name in shapes.keys() | engine.shapes if shapes.get(name) != engine.shapes.get(name))
        raise CheckpointError(
            f"{path} is of another model: {differing[0]} is {shapes.get(differing[0])} there and {engine.shapes.get(differing[0])} here"
            + (f" (and {len(differing) - 1} more)" if len(differing) > 1 else "")
        )
    with Pieces(path, info) as pieces:
        for fragment in engine.fragments(everything=True):
            for kind, target in {"model": fragment.master, **fragment.moments}.items():
                pieces.fill(f"{kind}/{fragment.name}", fragment.start, target)
        if ema is not None:
            for fragment, average in zip(ema.fragments, ema.averages, strict=False):
                pieces.fill(f"ema/{fragment.name}", fragment.start, average)
            for name, average in ema.buffers.items():
                average.copy_(pieces.whole(f"ema_buffer/{name}"))
        for name, buffer in engine.buffers().items():
            buffer.copy_(pieces.whole(f"buffer/{name}"))
    engine.set_optimizer_step_count(info.optimizer_step)
    engine.set_loss_scale_state(info.loss_scale)
    engine.publish()


def read_weights(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The whole state dict of a checkpoint, fp32, put together from its shards; `kind` is "ema" or "model". Needs no process group."""
    info = read_info(path)
    state = {}
    with Pieces(path, info) as pieces:
        for name, shape in info.shapes.items():
            state[name] = torch.empty(shape)
            pieces.fill(f"{kind}/{name}", 0, state[name].view(-1))
        for prefix in ("buffer/", "ema_buffer/") if kind == "ema" else ("buffer/",):  # integers are not averaged
            state |= {key.removeprefix(prefix): pieces.whole(key) for key in pieces.keys(prefix)}
    return state


def write_final_weights(output: Path, path: Path, kind: str) -> None:
    """Write `output/model.safetensors`: the whole state dict of checkpoint `path`, `kind` as in `read_weights`. One rank calls this."""
    info = read_info(path)
    about = {"model": info.config["model"], "classes": info.classes, "step": info.step}
    temporary = output / "model.safetensors.tmp"
    _save_file(read_weights(path, kind), temporary, {"catmodel": json.dumps(about)})
    os.replace(temporary, output / "model.safetensors")


def prune(folder: Path, step: int, keep: int) -> None:
    """After the save at `step`: remove all up to it but the `keep` newest and the one with the best top-1. One rank calls this.

    Later checkpoints stay and do not count: this run passed them over as damaged, or went back behind them. Nor do unreadable ones.
    """
    top1 = {}
    for path in list_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            info = read_info(path)
            if info.step <= step:
                top1[path] = info.top1
    best = max((path for path in top1 if top1[path] is not None), key=top1.get, default=None)
    for path in list(top1)[keep:]:
        if path != best:
            half = path.with_name(f".{path.name}.removed.tmp")  # under its own name it is whole or not there
            path.rename(half)
            shutil.rmtree(half)


class Pieces:
    """The shards of one checkpoint, opened: any range of any tensor, whoever wrote it."""

    def __init__(self, path: Path, info: CheckpointInfo):
        self.path = path
        self._files = [safe_open(path / name, framework="pt") for name in sorted(info.shards)]
        self._places: dict[str, list[tuple[int, int, object]]] = {}
        for file in self._files:
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():
                tensor = file.get_slice(key)
                start = starts.get(key, 0)
                self._places.setdefault(key, []).append((start, start + _numel(tensor.get_shape()), file))

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.__exit__(*error)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self._places if key.startswith(prefix)]

    def whole(self, key: str) -> torch.Tensor:
        """A tensor that was written in one piece (a buffer), in its own shape and type."""
        return self._find(key)[0][2].get_tensor(key)

    def fill(self, key: str, start: int, target: torch.Tensor) -> None:
        """Copy elements [start, start + target.numel()) of the flattened tensor `key` into the 1-D `target`."""
        stop, filled = start + target.numel(), 0
        for low, high, file in self._find(key):
            first, last = max(low, start), min(high, stop)
            if first < last:
                try:
                    target[first - start : last - start].copy_(file.get_slice(key)[first - low : last - low])
                except SafetensorError as error:
                    raise CheckpointError(f"{self.path}: {key} cannot be read ({error})") from error
                filled += last - first
        if filled != target.numel():
            raise CheckpointError(f"{self.path}: {key} has {filled} of the {target.numel()} elements from {start} on")

    def _find(self, key: str) -> list[tuple[int, int, object]]:
        if key not in self._places:
            raise CheckpointError(f"{self.path} has no {key}; it was written with other settings (EMA, optimizer) than this run has")
        return self._places[key]


def _numel(shape: list[int]) -> int:
    numel = 1
    for side in shape:
        numel *= side
    return numel
