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
    from train.engine import DTYPES
    from train.tasks.classification import build_model

    sizes = config.train
    return Job(
        parameters=sum(weight.numel() for weight in on_meta(lambda: build_model(config, classes)).parameters()),
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


def memory(config: Config, classes: int, world: int) -> dict[int, dict[str, float]]:
    """Bytes of GPU memory of a rank by ZeRO stage, and by what they are for. Activations are what autograd keeps for one micro-batch in the
    plain path.

    Counted, not tried: libraries' own memory and fragmentation are not in it. Stages 1 and 2 run as 0 on one rank.
    """
    import torch

    from train.engine import DTYPES, zero_stage
    from train.micro_batch import kept_beside
    from train.runtime import Runtime
    from train.tasks.classification import build_model

    dtype, rank = DTYPES[config.train.precision], Runtime(0, world, 0, torch.device("cuda"))
    model = on_meta(lambda: build_model(config, classes)).to(dtype)
    weights = sum(weight.nbytes for weight in model.parameters())
    kept = activations(model, config.train.micro_batch, config.data.image_size, dtype)
    sizes = {}
    for asked in range(4):
        zero = config.zero.model_copy(update={"stage": asked, "offload": config.zero.offload and asked > 0})
        of_stage = config.model_copy(update={"zero": zero})
        stage = zero_stage(of_stage, world)
        sizes[asked] = {
            "weights": weights / (world if stage == 3 else 1),
            "gradients": weights / (world if stage >= 2 else 1),
            "optimizer": float(kept_beside(model, of_stage, rank)),
            "activations": kept,
        }
    return sizes


def activations(model, images: int, size: int, dtype) -> float:
    """Bytes that autograd keeps of a forward pass of `images`: each storage once, weights left out."""
    import torch

    kept: dict[int, int] = {}
    own = {weight.untyped_storage()._cdata for weight in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(torch.zeros(images, 3, size, size, device="meta", dtype=dtype))
    del result
    return float(sum(kept.values()))


def on_meta(build):
    """A model that takes no memory."""
    import torch

    with torch.device("meta"):
        return build()
