"""The protocol between a task and the rest of the program: what trainer, commands and monitor know of a task."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.annotations import Labels, Targets
from data_pipeline.config import AugmentConfig
from data_pipeline.loader import Loader, MicroBatch, build_loader, evaluation_batches
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, make_key
from data_pipeline.split import Split
from data_pipeline.views import Crops, Views, evaluation_slices
from train.config import Config, ConfigError
from train.telemetry.metrics import Metric, Scores

Model = Callable[..., Any]  # a module, or the engine around it


class Tally(Protocol):
    """Collects what an evaluation is made of, over this rank's batches."""

    width: int  # numbers that `add` returns

    def add(self, model: Model, batch: MicroBatch) -> Tensor:
        """Evaluate one batch; returns numbers to be summed over all batches, float64 [width], on the device.

        Samples that are not `batch.counted` must not contribute to anything.
        """

    def finish(self, sums: Sequence[float]) -> tuple[Scores, dict]:
        """The scores, and what is kept of the evaluation as JSON; every rank calls this and gets the same.

        sums: of what `add` returned, over all batches of all ranks, added in one order.
        """


class Prediction(Protocol):
    """What `predict` found in one image file. problem: why it could not be read, or None."""

    path: Path
    problem: str | None

    def text(self) -> str:
        """For people, one or more lines."""

    def json(self) -> dict[str, Any]:
        """For programs."""


class Task(ABC):
    """One kind of training. Everything random in it must be a function of the keys that its methods are given.

    classes: the names of the dataset's classes, in the order of their labels.
    """

    metrics: ClassVar[tuple[Metric, ...]]  # of an evaluation; the first is the primary one
    losses: ClassVar[tuple[str, ...]] = ("loss",)  # the names of what `loss` returns
    samples: ClassVar[str] = "images"  # what is counted
    one_shape: ClassVar[bool] = True  # an evaluation's images all have the shape of training inputs
    has_results: ClassVar[bool] = False  # the tally has write_results(path), for launch/evaluate.py --results
    # Keys of the config that launch/evaluate.py may change although training uses them, too; see also
    # TaskConfig.evaluation_keys. The default is that of `views`.
    evaluation_settings: ClassVar[tuple[str, ...]] = ("data.eval_crop",)

    def __init__(self, config: Config, classes: Sequence[str]):
        self.config, self.classes = config, tuple(classes)

    # --- the network ---

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The network, with random weights of torch's default generator.

        Raises ConfigError for settings that do not fit together.
        """

    def initial_model(self) -> nn.Module:
        """The network with its initial weights, a function of the seed alone."""
        torch.manual_seed(make_key(self.config.train.seed, Stream.INIT))
        return self.build_model()

    @abstractmethod
    def example(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The network's input for `count` samples: zeros, for measuring time and memory; on the meta device, for
        counting.
        """

    @abstractmethod
    def example_loss(self, output: Any) -> Tensor:
        """A scalar whose gradient takes the memory of a training step's. output: of the network, for `example`."""

    def load_weights(
        self, model: nn.Module, weights: dict[str, Tensor], about: dict[str, Any], source: str
    ) -> list[str]:
        """Fill `model` with first weights from the file or folder `source` (model.init_from); returns sentences for the
        log.

        about: what is known of the weights, such as the names of the "classes" that they were trained on and the
        settings of their "task"; see catmodel.pretrained.about. Raises ConfigError if they do not fit.
        """
        model.load_state_dict(weights)
        return []

    # --- training ---

    def views(self) -> Views:
        """Which part of each image is used, and at what size; by default the crops of classification."""
        return Crops(self.config.data, self.config.augment)

    def targets(self, split: Split, training: bool) -> Targets:
        """How the samples' labels are read, in training or in evaluation; by default the records' integers.

        Each loader takes a new one, and closes it.
        """
        return Labels(split)

    @abstractmethod
    def inputs(self, batch: MicroBatch, epoch: int, device: torch.device) -> Any:
        """A micro-batch on the device, augmented: any nested structure of tensors, which `loss` takes.

        On a GPU this runs on a side stream, beside the previous micro-batch's forward and backward pass.
        """

    @abstractmethod
    def loss(self, model: Model, inputs: Any) -> dict[str, Tensor]:
        """The losses of one micro-batch by name (see `losses`), each a mean over the micro-batch.

        Their sum is trained on.

        Nothing may be normalised by numbers of one rank. torch's generators have been seeded by (seed, step,
        micro-batch index).
        """

    def loss_names(self) -> list[str]:
        """The rows of `new_losses`: "loss", the sum that is trained on, and its parts if there are several."""
        return ["loss", *self.losses] if len(self.losses) > 1 else ["loss"]

    def new_losses(self, micro_batches: int, device: torch.device) -> Tensor:
        """Zeros for a step's losses, float64 [len(loss_names()), micro_batches]."""
        return torch.zeros(len(self.loss_names()), micro_batches, dtype=torch.float64, device=device)

    def losses_to_train(self, model: Model, inputs: Any) -> list[Tensor]:
        """The losses of one micro-batch, in the order of `loss_names`."""
        parts = self.loss(model, inputs)
        total = functools.reduce(torch.add, parts.values())
        return [total, *(parts[name] for name in self.loss_names()[1:])]

    def preview(self, inputs: Any, count: int) -> Tensor | None:
        """Up to `count` images of a micro-batch as the network sees them, float [n, 3, H, W] in 0..1 on the CPU; None:
        nothing to show.
        """
        return None

    # --- evaluation and use ---

    @abstractmethod
    def tally(self, device: torch.device, split: Split) -> Tally:
        """A new evaluation, on `split`."""

    def evaluation_picture(self, details: dict) -> Tensor | None:
        """What TensorBoard shows of an evaluation: a picture [3, H, W] in 0..1, or None. details: of Tally.finish."""
        return None

    def evaluation_text(self, details: dict) -> str | None:
        """The same in Markdown."""
        return None

    def predict(
        self, model: nn.Module, paths: Sequence[Path], device: torch.device, batch: int, **options: Any
    ) -> Iterator[Prediction]:
        """What `model` (in evaluation mode, on `device`) finds in image files, in their order.

        options: those of launch/predict.py that were given. A task names the ones that it takes.
        """
        raise ConfigError(f"launch/predict.py does not support the task {self.config.task.name}")

    def export(self, state: dict[str, Tensor], features: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The network with the weights `state`, as launch/export.py writes it, and a description of it (JSON).

        features: in place of the outputs, the feature maps of all stages.
        """
        raise ConfigError(f"launch/export.py does not support the task {self.config.task.name}")


def build_network(config: Config, create: Callable[..., nn.Module], settings: dict[str, Any]) -> nn.Module:
    """create(**settings), with activation checkpointing and kernels set as the config says.

    Raises ConfigError for settings that do not fit together.
    """
    try:
        model = create(**settings)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    model.set_grad_checkpointing(config.train.activation_checkpointing)
    model.set_kernels(config.train.kernels)
    return model


def example_losses(task: Task) -> Callable[[Model, Tensor], list[Tensor]]:
    """The engine's `losses` for inputs that `task.example` describes: to measure a step without data."""
    return lambda model, example: [task.example_loss(model(example))]


def build_task(config: Config, classes: Sequence[str]) -> Task:
    """The config's task, for a dataset with these classes."""
    from train.task_registry import find

    return find(config.task.name).load()(config, classes)


def training_batches(task: Task, split: Split, order: Order, rank: int, world: int, start_step: int) -> Loader:
    """The micro-batches of `rank` from step `start_step` on, without end."""
    targets = task.targets(split, training=True)
    return build_loader(
        task.config.data, task.views(), split, order, targets, rank=rank, world=world, start_step=start_step
    )


def evaluate(
    task: Task,
    model: Model,
    split: Split,
    device: torch.device,
    meet: Callable[[MicroBatch], None],
    rank: int = 0,
    world: int = 1,
    tally: Tally | None = None,
) -> tuple[Scores, dict]:
    """Evaluate `model`, in evaluation mode, on all samples of `split`, each exactly once; all ranks must call, all get
    the result.

    Batches are fixed slices of the ids (views.evaluation_slices), so a sample is always computed together with the same
    others, on any number of ranks. Each batch's sums go into a row of their own, and the rows are added in one order:
    the result is the same to the last bit on any number of ranks.
    meet: called with every batch of this rank before it is evaluated. tally: a new one of the task, if the caller needs
    it.
    """
    size, views = task.config.train.micro_batch, task.views()
    count = len(evaluation_slices(views, split.records["width"], split.records["height"], size))
    tally = tally or task.tally(device, split)
    sums = torch.zeros(count, tally.width, dtype=torch.float64, device=device)
    targets = task.targets(split, training=False)
    for row, batch in evaluation_batches(task.config.data, views, split, size, targets, rank=rank, world=world):
        meet(batch)
        sums[row] += tally.add(model, batch)
    if dist.is_initialized():
        dist.all_reduce(sums)  # every row is zero on all ranks but one: exact
    return tally.finish([sum(column) for column in (column.cpu().tolist() for column in sums.unbind(1))])


def on_device(batch: MicroBatch, device: torch.device) -> Tensor:
    """The images of a micro-batch on the device, uint8."""
    if batch.images.is_cuda:  # written there by the loader, on a stream of its own
        batch.images.record_stream(torch.cuda.current_stream())
    return batch.images.to(device, non_blocking=True)


def unnormalised(images: Tensor, settings: AugmentConfig) -> Tensor:
    """The network's input [n, 3, H, W], red, green, blue, as pixels in 0..1, float on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return (images.float().cpu() * std + mean).clamp(0, 1)
