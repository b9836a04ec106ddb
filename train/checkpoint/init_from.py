"""A run's first weights: `model.init_from`.

A run that has a checkpoint goes on from that and does not read them again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.resume_point import Resume
from train.config import Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.engine.runtime import Runtime
    from train.tasks.base import Task


def check_source(config: Config, resume: Resume) -> None:
    """Raise ConfigError, before torch is imported, if the run begins and its `model.init_from` does not exist."""
    source = config.model.init_from
    if source and resume.begins and not Path(source).exists():
        raise ConfigError(
            f"model.init_from: there is no {source}; name a file of weights, a run's folder or a checkpoint's, or set "
            "model.init_from=null for fresh weights"
        )


def load_first_weights(model: "nn.Module", task: "Task", runtime: "Runtime", resume: Resume) -> list[str]:
    """Fill `model`, moved to the device, with the weights of `model.init_from`, if there is one and the run begins.

    Every rank calls this. Rank 0 reads and broadcasts, so that all have the same weights. Returns sentences for the
    log. Raises ConfigError.
    """
    import torch.distributed as dist

    if not task.config.model.init_from:
        return []
    result: list = [None]
    if runtime.is_main:
        try:
            result[0] = _load(model, task) if resume.begins else []
        except ConfigError as error:
            result[0] = error
    dist.broadcast_object_list(result)
    if isinstance(result[0], ConfigError):
        raise result[0]
    if result[0]:
        for tensor in model.to(runtime.device).state_dict().values():
            dist.broadcast(tensor, 0)
    return result[0]


def _load(model: "nn.Module", task: "Task") -> list[str]:
    source = Path(task.config.model.init_from)
    weights, about = read_source(source)
    sentences = task.load_weights(model, weights, about, str(source))
    return [
        f"first weights from {source}; once the run has a checkpoint of its own, they are not read again",
        *sentences,
    ]


def read_source(source: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The state dict in `source`, and what it says of itself, as catmodel.pretrained.about. Raises ConfigError.

    source: a published file; a .safetensors file; a run's folder (its model.safetensors or, before the end of the run,
    its newest sound checkpoint); or a checkpoint's folder. From checkpoints the EMA is taken, if there is one.
    """
    from catmodel.pretrained import about, published_weights
    from train.checkpoint.trained_model import read_trained

    if (source / "model.safetensors").is_file():
        source = source / "model.safetensors"
    try:
        if not source.is_dir():
            return published_weights(source), about(source) if source.suffix == ".safetensors" else {}
        trained = read_trained(source)
        return trained.state, {"classes": trained.classes, "task": trained.config.task.model_dump(mode="json")}
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"model.init_from: {error}") from error
