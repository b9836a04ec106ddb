"""Where a run's first weights come from: `model.init_from`. A run that has a checkpoint takes that, and never looks here again."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.config import Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_pipeline.manifest import Manifest
    from train.engine.runtime import Runtime


def check_source(config: Config, checkpoints: Path, resume: str) -> None:
    """Raises ConfigError, before torch is imported, where a run is to begin from a `model.init_from` that is not there."""
    source = config.model.init_from
    if source and begins(checkpoints, resume) and not Path(source).exists():
        raise ConfigError(f"model.init_from: there is no {source}; name a file of weights, a run's folder or a checkpoint's")


def begins(checkpoints: Path, resume: str) -> bool:
    """Whether `resume` ("auto", "never" or a path) means a run that has nothing to go on from."""
    return resume in ("auto", "never") and not any(checkpoints.glob("step_*"))


def load_first_weights(model: "nn.Module", config: Config, manifest: "Manifest", runtime: "Runtime", begins: bool) -> list[str]:
    """Fill `model`, moved to the device, with the weights of `model.init_from`, where there is one and the run `begins`.

    Every rank calls this; rank 0 reads, so that all have the same weights. Position tables are interpolated to the model's image size;
    the head stays as it was initialised where the classes are others. Returns sentences for the log. Raises ConfigError.
    """
    import torch.distributed as dist

    if not config.model.init_from:
        return []
    verdict: list = [None]
    if runtime.is_main:
        try:
            verdict[0] = _load(model, config, list(manifest.classes)) if begins else []
        except ConfigError as error:
            verdict[0] = error
    dist.broadcast_object_list(verdict)
    if isinstance(verdict[0], ConfigError):
        raise verdict[0]
    if verdict[0]:
        for tensor in model.to(runtime.device).state_dict().values():
            dist.broadcast(tensor, 0)
    return verdict[0]


def _load(model: "nn.Module", config: Config, classes: list[str]) -> list[str]:
    from catmodel.pretrained import DoesNotFit, load_published

    source = Path(config.model.init_from)
    weights, their_classes = read_source(source)
    count = next((len(head) for head in map(weights.get, ("head.weight", "fc.weight")) if getattr(head, "ndim", 0)), 0)
    others = count != len(classes) or their_classes not in (None, classes)
    try:
        report = load_published(model, weights, resize_positions=True, fresh_head=others)
    except DoesNotFit as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        raise ConfigError(f"model.init_from: {source} does not fit this {config.model.name}: {error.problems[0]}{more}") from error
    sentences = [f"first weights from {source}; once the run has a checkpoint of its own, they are not read again"]
    if report.resized:
        sentences.append(f"position tables interpolated: {', '.join(report.resized)}")
    if others:
        sentences.append(f"head: {count} -> {len(classes)} classes, fresh")
    return sentences


def read_source(source: Path) -> tuple[dict[str, "Tensor"], list[str] | None]:
    """The state dict that `source` holds, and the names of its classes where it says them. Raises ConfigError.

    source: a published file; a .safetensors file; a run's folder, of which it is model.safetensors or, before the end of the run, the
    newest sound checkpoint; or a checkpoint's folder. Of checkpoints it is the EMA, where there is one.
    """
    from catmodel.pretrained import published_weights
    from train.checkpoint.trained_model import read_trained

    if (source / "model.safetensors").is_file():
        source = source / "model.safetensors"
    try:
        if not source.is_dir():
            return published_weights(source), _classes_in(source)
        trained = read_trained(source)
        return trained.state, trained.classes
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"model.init_from: {error}") from error


def _classes_in(file: Path) -> list[str] | None:
    """The classes that a run has written into its model.safetensors."""
    from catmodel.pretrained import about

    return about(file).get("classes") if file.suffix == ".safetensors" else None
