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
    notes: list[str]  # sentences on checkpoints that were passed over as damaged

    def model(self) -> "nn.Module":
        """The classifier, on the CPU, in evaluation mode. Raises ConfigError where its config is of another model than its weights."""
        from train.tasks.classification.task import build_model

        self._check()
        model = build_model(self.config, len(self.classes))
        model.load_state_dict(self.state)
        return model.eval()

    def _check(self) -> None:
        """Before there is memory for a model: a stranger's config may say what it likes, and the weights are as large as their files."""
        import torch

        from train.checkpoint.pieces import CheckpointError
        from train.tasks.classification.task import build_model

        if sum(self.config.model.depths or ()) > len(self.state):
            raise CheckpointError(f"{self.checkpoint} has more model.depths than weights")
        try:
            with torch.device("meta"):
                model = build_model(self.config, len(self.classes))
        except (ConfigError, RuntimeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{self.checkpoint}: the model of its config cannot be built ({error})") from error
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        differing = [name for name in shapes.keys() | self.state if name not in shapes or name not in self.state]
        differing += [name for name in shapes if name in self.state and self.state[name].shape != shapes[name]]
        if differing:
            raise CheckpointError(
                f"{self.checkpoint}: its weights are not those of its model.name {self.config.model.name}: {min(differing)}"
            )

    def backbone(self) -> "nn.Module":
        """The same weights with features_only: its maps, of images of any size. CAT's norms of the maps are as initialised."""
        import catmodel

        self._check()
        model = catmodel.create_model(**self.settings(), features_only=True)
        catmodel.load_published(model, self.state)
        return model.eval()

    def settings(self) -> dict[str, Any]:
        """What `catmodel.create_model` builds this classifier from."""
        config = self.config
        sizes = {"img_size": config.data.image_size, "num_classes": len(self.classes)}
        return {"name": config.model.name, **sizes, **config.model.overrides()}


def check_target(target: str, best: bool = False) -> Path:
    """Raises ConfigError, before torch is imported, where there is no such folder, or with `best` where it is no run's."""
    if not Path(target).is_dir():
        raise ConfigError(f"{target} is neither a run's folder nor a checkpoint")
    if best and not (Path(target) / "checkpoints").is_dir():
        raise ConfigError(f"--best chooses among a run's checkpoints, and {target} is no run's folder; leave it out")
    return Path(target)


def read_trained(target: Path, weights: str | None = None, *, best: bool = False) -> Trained:
    """target: a run's folder or a checkpoint's. weights: "ema" or "model"; by default the EMA, where the run has it.

    Of a run, its newest sound checkpoint is taken, or with `best` the one whose evaluation had the best top-1 (the EMA's, where there is
    one). Raises ConfigError; StorageError where the disk does not answer.
    """
    from train.checkpoint.format import evaluated, first_sound, list_checkpoints, read_weights, validate
    from train.checkpoint.pieces import CheckpointError

    folder = target / "checkpoints"
    if folder.is_dir():
        candidates = [path for path, _ in evaluated(folder)] if best else list_checkpoints(folder)
        checkpoint, info, notes = first_sound(candidates)
        if checkpoint is None:
            kind = "no sound checkpoint that was evaluated; leave out --best" if best else "no sound checkpoint"
            raise ConfigError(f"{folder} has {kind}")
    else:
        checkpoint, info, notes = target, validate(target), []
    try:
        config = parse_config(info.config, source=str(checkpoint))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error  # the text has a stranger's values in it
    weights = weights or ("ema" if config.ema.decay else "model")
    return Trained(checkpoint, config, info.classes, weights, read_weights(checkpoint, weights), [f"passed over: {note}" for note in notes])
