"""The manifest of a checkpoint, and which of a folder's checkpoints are sound. Light: without torch."""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from data_pipeline.config import has_secret, without_secrets
from data_pipeline.durable import fsync, sha256_of
from data_pipeline.faults import LASTING, retried
from train.config import ConfigError
from train.telemetry.formatting import printable
from train.telemetry.metrics import LARGEST

MANIFEST = "manifest.json"
VERSION = 2  # 1 had "top1" in place of "score", and classification alone
LARGEST_MANIFEST = 256 << 20  # bytes

Score = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
ShardName = Annotated[str, Field(pattern=r"^shard_[0-9]{5,}\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CheckpointError(ConfigError):
    """A checkpoint cannot be used. The message has its path and the reason."""

    def __init__(self, text: str):
        super().__init__(printable(text))


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


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of step `step` in `folder`."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


def write_manifest(folder: Path, info: CheckpointInfo) -> None:
    """Write the manifest into `folder`, which has all shards, and flush it and the folder to the disk."""
    path = folder / MANIFEST
    path.write_text(json.dumps(asdict(info), indent=1))
    fsync(path)
    fsync(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in `folder`, newest first, without validation.

    Other names, such as step_00000002.bad, are no checkpoints. Raises OSError if the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [folder / name for name in names if re.fullmatch(r"step_[0-9]{8,}", name)]
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
