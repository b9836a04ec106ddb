"""What a config asks of a cluster, counted: steps, parameters, bytes of memory."""

from dataclasses import dataclass, replace

from train.config import Config, ConfigError


@dataclass(frozen=True)
class Job:
    """Counts of one run; `element_bytes` is a weight's in the precision that is computed in."""

    parameters: int
    element_bytes: int
    classes: int
    images: int
    validation_images: int
    global_batch: int
    micro_batch: int
    epochs: int
    max_steps: int | None
    zero_stage: int
    checkpoint_every: int | None  # steps; None: an epoch's
    evaluate_every: int  # epochs; 0: never
    evaluated_weights: int  # 2 with EMA

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.global_batch

    @property
    def steps(self) -> int:
        return min(self.epochs * self.steps_per_epoch, self.max_steps or self.epochs * self.steps_per_epoch)

    @property
    def every(self) -> int:
        return self.checkpoint_every or self.steps_per_epoch

    def accumulation(self, world: int) -> int:
        """Micro-batches of a rank in a step. Raises ConfigError where `world` ranks cannot share them, as training would."""
        return accumulation(self.global_batch, self.micro_batch, world)

    def fitted(self, world: int) -> "Job":
        """This job on any number of ranks: with a larger global batch, and fewer steps, where they could not share this one's.

        That is another recipe, and says nothing about what it would learn.
        """
        share = max(1, round(self.global_batch / self.micro_batch / world))
        return replace(self, global_batch=self.micro_batch * share * world)


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    total = global_batch // micro_batch
    if total % world:
        fitting = ", ".join(str(size) for size in range(1, total + 1) if total % size == 0)
        raise ConfigError(
            f"{world} ranks cannot share the {total} micro-batches of a step evenly (train.global_batch {global_batch} / "
            f"train.micro_batch {micro_batch}); world sizes that can: {fitting}; or give train.micro_batch=N"
        )
    return total // world


def check_sizes(config: Config, images: int, world: int) -> None:
    """Raises ConfigError where nothing can be planned with these sizes; before torch is imported."""
    sizes = config.train
    if sizes.micro_batch == "auto":
        raise ConfigError("plan.py needs a number of images: give train.micro_batch=N (a first start's log says what auto came to)")
    if images < sizes.global_batch:
        raise ConfigError(f"{images} training images are less than one step's: give a smaller train.global_batch than {sizes.global_batch}")
    accumulation(sizes.global_batch, sizes.micro_batch, world)


def count_job(config: Config, images: int, validation_images: int, classes: int) -> Job:
    """Of sizes that `check_sizes` has found good."""
    from train.engine.deepspeed_engine import DTYPES
    from train.engine.estimate import meta_model

    sizes = config.train
    return Job(
        parameters=sum(weight.numel() for weight in meta_model(config, classes).parameters()),
        element_bytes=DTYPES[sizes.precision].itemsize,
        classes=classes,
        images=images,
        validation_images=validation_images,
        global_batch=sizes.global_batch,
        micro_batch=sizes.micro_batch,
        epochs=sizes.epochs,
        max_steps=sizes.max_steps,
        zero_stage=config.zero.stage,
        checkpoint_every=config.checkpoint.every_steps,
        evaluate_every=sizes.evaluate_every if validation_images else 0,
        evaluated_weights=2 if config.ema.decay else 1,
    )


def memory(config: Config, classes: int, world: int) -> dict[int, dict[str, int]]:
    """Bytes of GPU memory of a rank by ZeRO stage, and by what they are for. Activations are what autograd keeps for one micro-batch in the
    plain path.

    Counted, not tried: libraries' own memory and fragmentation are not in it. Stages 1 and 2 run as 0 on one rank.
    """
    import torch

    from train.engine.estimate import activations, held, meta_model
    from train.engine.runtime import Runtime

    model, rank = meta_model(config, classes), Runtime(0, world, 0, torch.device("cuda"))
    kept, sizes = activations(model, config), {}
    for stage in range(4):
        zero = config.zero.model_copy(update={"stage": stage, "offload": config.zero.offload and stage > 0})
        sizes[stage] = {**held(model, config.model_copy(update={"zero": zero}), rank), "activations": kept}
    return sizes
