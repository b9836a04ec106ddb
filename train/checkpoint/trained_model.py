"""Loads a trained model from a run's folder or a checkpoint, for evaluation, export and prediction."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.tasks.base import Task


@dataclass(frozen=True)
class Trained:
    """Weights of a checkpoint, fp32, with the config and the class names of their run. weights: "ema" or "model"."""

    checkpoint: Path
    config: Config
    classes: list[str]
    weights: str
    state: dict[str, "Tensor"]
    notes: list[str]  # sentences on checkpoints that were passed over as damaged

    def task(self) -> "Task":
        """The task that the weights were trained for.

        Raises CheckpointError if its network has other weights than these.
        """
        from train.tasks.base import build_task

        task = build_task(self.config, self.classes)
        self._check(task)
        return task

    def model(self) -> "nn.Module":
        """The network, on the CPU, in evaluation mode."""
        model = self.task().build_model()
        model.load_state_dict(self.state)
        return model.eval()

    def _check(self, task: "Task") -> None:
        """Compare names and shapes before memory is allocated for a model: the config may come from a stranger and name
        any size.
        """
        import torch

        from train.checkpoint.info import CheckpointError

        if sum(self.config.model.depths or ()) > len(self.state):
            raise CheckpointError(f"{self.checkpoint} has more model.depths than weights")
        try:
            with torch.device("meta"):
                model = task.build_model()
        except (ConfigError, RuntimeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{self.checkpoint}: the model of its config cannot be built ({error})") from error
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        differing = [name for name in shapes.keys() | self.state if name not in shapes or name not in self.state]
        differing += [name for name in shapes if name in self.state and self.state[name].shape != shapes[name]]
        if differing:
            raise CheckpointError(
                f"{self.checkpoint}: its weights are not those of its model.name {self.config.model.name}: "
                f"{min(differing)}"
            )


def check_target(target: str, best: bool = False) -> Path:
    """Raise ConfigError, before torch is imported, if `target` is not a folder or, with `best`, not a run's folder."""
    if not Path(target).is_dir():
        raise ConfigError(f"{target} is neither a run's folder nor a checkpoint")
    if best and not (Path(target) / "checkpoints").is_dir():
        raise ConfigError(f"--best chooses among a run's checkpoints, and {target} is no run's folder; leave it out")
    return Path(target)


def read_trained(target: Path, weights: str | None = None, *, best: bool = False) -> Trained:
    """Read the weights of `target`, a run's folder or a checkpoint's.

    weights: "ema" or "model"; by default the EMA if the run has it. Of a run, the newest undamaged checkpoint is read,
    or with `best` the one with the best score (the EMA's if there is one). Raises ConfigError, or StorageError if the
    disk does not answer.
    """
    from train.checkpoint.format import read_weights
    from train.checkpoint.info import evaluated, first_sound, list_checkpoints, validate
    from train.checkpoint.resume_point import settings_of

    folder = target / "checkpoints"
    if (target / "config.yaml").is_file() and not list_checkpoints(folder):
        raise ConfigError(f"{target} is a run that has no checkpoint yet")
    if folder.is_dir():
        candidates = [path for path, _ in evaluated(folder)] if best else list_checkpoints(folder)
        checkpoint, info, notes = first_sound(candidates)
        if checkpoint is None:
            kind = "no sound checkpoint that was evaluated; leave out --best" if best else "no sound checkpoint"
            raise ConfigError(f"{folder} has {kind}")
    else:
        checkpoint, info, notes = target, validate(target), []
    config = settings_of(checkpoint, info)
    if weights == "ema" and not config.ema.decay:
        raise ConfigError(f"{checkpoint} has no EMA, because its run had ema.decay=0: give --weights model")
    weights = weights or ("ema" if config.ema.decay else "model")
    return Trained(
        checkpoint,
        config,
        info.classes,
        weights,
        read_weights(checkpoint, weights),
        [f"passed over: {note}" for note in notes],
    )
