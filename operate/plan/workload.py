"""What a run has to compute and store: steps, parameters, bytes of memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from train.config import Config, ConfigError

if TYPE_CHECKING:
    from train.tasks.base import Task


@dataclass(frozen=True)
class Workload:
    """Counts of one run. element_bytes: of a weight in the precision that is computed in."""

    parameters: int
    element_bytes: int
    images: int
    validation_images: int
    global_batch: int
    micro_batch: int
    epochs: int | None  # None: see total_steps
    max_steps: int | None
    zero_stage: int
    checkpoint_every: int | None  # steps; None: see checkpoint_every_epochs
    evaluate_every: int  # epochs; 0: never, whatever evaluate_every_steps is
    evaluated_weights: int  # 2 with EMA
    total_steps: int | None = None  # of a run whose length is not given in epochs
    checkpoint_every_epochs: int = 1
    evaluate_every_steps: int | None = None  # replaces evaluate_every
    groups: tuple[int, ...] | None = None  # numbers of images of which micro-batches are made apart; None: of all

    @property
    def steps_per_epoch(self) -> int:
        """As the run's Order has it."""
        micro_batches = sum(images // self.micro_batch for images in self.groups or (self.images,))
        return micro_batches // (self.global_batch // self.micro_batch)

    @property
    def whole_steps(self) -> int:
        """Steps of the whole run, without train.max_steps."""
        return self.total_steps or self.epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        return min(self.whole_steps, self.max_steps or self.whole_steps)

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or self.checkpoint_every_epochs * self.steps_per_epoch

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations; 0: none."""
        if not (self.validation_images and self.evaluate_every):
            return 0
        return self.evaluate_every_steps or self.evaluate_every * self.steps_per_epoch

    def accumulation(self, world: int) -> int:
        """Micro-batches of a rank in a step. Raises ConfigError if `world` ranks cannot share them evenly."""
        return accumulation(self.global_batch, self.micro_batch, world)

    def fitted(self, world: int) -> Workload:
        """The same on any number of ranks: with another global batch if they could not share this one's.

        That is another recipe, and may reach another accuracy.
        """
        share = max(1, round(self.global_batch / self.micro_batch / world))
        return replace(self, global_batch=self.micro_batch * share * world)


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches of a rank in a step. Raises ConfigError if the ranks cannot share them evenly."""
    total = global_batch // micro_batch
    if total % world:
        fitting = ", ".join(str(size) for size in range(1, total + 1) if total % size == 0)
        raise ConfigError(
            f"{world} ranks cannot share the {total} micro-batches of a step evenly (train.global_batch {global_batch} "
            f"/ train.micro_batch {micro_batch}); world sizes that can: {fitting}; or give train.micro_batch=N"
        )
    return total // world


def check_sizes(config: Config, images: int, world: int) -> None:
    """Raise ConfigError if nothing can be planned with these sizes, or the run would refuse them; before torch is
    imported.
    """
    sizes = config.train
    if sizes.micro_batch == "auto":
        raise ConfigError(
            "plan.py needs a number of images: give train.micro_batch=N (a first start's log says what auto came to)"
        )
    if images < sizes.global_batch:
        raise ConfigError(
            f"{images} training images are less than one step's: give a smaller train.global_batch than "
            f"{sizes.global_batch}"
        )
    accumulation(sizes.global_batch, sizes.micro_batch, world)
    config.check_warmup(images // sizes.global_batch)


def count_workload(task: Task, images: int, validation_images: int, groups: tuple[int, ...] | None = None) -> Workload:
    """The workload of the task's config, whose sizes `check_sizes` has accepted."""
    from operate.task_model import meta_model
    from train.engine.deepspeed_engine import DTYPES

    config, sizes = task.config, task.config.train
    return Workload(
        parameters=sum(weight.numel() for weight in meta_model(task).parameters()),
        element_bytes=DTYPES[sizes.precision].itemsize,
        images=images,
        validation_images=validation_images,
        global_batch=sizes.global_batch,
        micro_batch=sizes.micro_batch,
        epochs=sizes.epochs,
        max_steps=sizes.max_steps,
        zero_stage=config.zero.stage,
        checkpoint_every=config.checkpoint.every_steps,
        evaluate_every=sizes.evaluate_every,
        evaluated_weights=2 if config.ema.decay else 1,
        total_steps=sizes.steps,
        checkpoint_every_epochs=config.checkpoint.every_epochs,
        evaluate_every_steps=sizes.evaluate_every_steps,
        groups=groups,
    )


def memory_by_stage(task: Task, world: int) -> dict[int, dict[str, int]]:
    """Bytes of GPU memory of a rank, by ZeRO stage and purpose.

    "activations" are what autograd saves for one micro-batch in the plain path. Libraries' own memory and fragmentation
    are not counted. On one rank stages 1 and 2 run as 0.
    """
    import torch

    from operate.task_model import meta_model
    from train.engine.deepspeed_engine import DTYPES
    from train.engine.estimate import activation_bytes, resident_bytes
    from train.engine.runtime import Runtime

    config, model = task.config, meta_model(task)
    rank = Runtime(0, world, 0, torch.device("cuda"))
    example = task.example(config.train.micro_batch, torch.device("meta"), DTYPES[config.train.precision])
    activations, sizes = activation_bytes(model, example, task.example_loss), {}
    for stage in range(4):
        zero = config.zero.model_copy(update={"stage": stage, "offload": config.zero.offload and stage > 0})
        resident = resident_bytes(model, config.model_copy(update={"zero": zero}), rank, task.views().most_shapes)
        sizes[stage] = {**resident, "activations": activations}
    return sizes
