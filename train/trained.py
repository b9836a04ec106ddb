"""A trained model, from a run's folder or a checkpoint's: what evaluation, export and prediction begin with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Config, ConfigError, parse_config

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Trained:
    """The weights of `checkpoint` that `weights` names ("ema" or "model"), fp32, with the config and the class names of their run."""

    checkpoint: Path
    config: Config
    classes: list[str]
    weights: str
    state: dict[str, "Tensor"]

    def model(self) -> "nn.Module":
        """The classifier, on the CPU, in evaluation mode."""
        from train.tasks.classification import build_model

        model = build_model(self.config, len(self.classes))
        model.load_state_dict(self.state)
        return model.eval()

    def backbone(self) -> "nn.Module":
        """The same weights with features_only: its maps, of images of any size. CAT's norms of the maps are as initialised."""
        import catmodel

        model = catmodel.create_model(**self.settings(), features_only=True)
        catmodel.load_published(model, self.state)
        return model.eval()

    def settings(self) -> dict[str, Any]:
        """What `catmodel.create_model` builds this classifier from."""
        config = self.config
        sizes = {"img_size": config.data.image_size, "num_classes": len(self.classes)}
        return {"name": config.model.name, **sizes, **config.model.overrides()}


def check_target(target: str) -> Path:
    """Raises ConfigError, before torch is imported, where there is no such folder."""
    if not Path(target).is_dir():
        raise ConfigError(f"{target} is neither a run's folder nor a checkpoint")
    return Path(target)


def read_trained(target: Path, weights: str | None = None, data: str | None = None) -> Trained:
    """target: a run's folder (its newest sound checkpoint is taken) or a checkpoint's. weights: default the EMA, where the run has it.

    data: a dataset's path in place of the run's own. Raises ConfigError.
    """
    from train.checkpoint import newest_valid, read_weights, validate

    checkpoint = newest_valid(target / "checkpoints")[0] if (target / "checkpoints").is_dir() else target
    if checkpoint is None:
        raise ConfigError(f"{target / 'checkpoints'} has no sound checkpoint")
    info = validate(checkpoint)
    if data:
        info.config["data"]["path"] = data
    config = parse_config(info.config, source=str(checkpoint))
    weights = weights or ("ema" if config.ema.decay else "model")
    return Trained(checkpoint, config, info.classes, weights, read_weights(checkpoint, weights))
