"""`train.micro_batch: auto`: the largest micro-batch that fits, found by trying."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.faults import StorageError
from data_pipeline.order import Order
from train.checkpoint.info import read_info
from train.checkpoint.resume_point import Resume, settings_of
from train.config import Config, ConfigError
from train.engine.deepspeed_engine import DTYPES
from train.engine.estimate import gradient_bytes, optimizer_bytes
from train.engine.memory import at_most, free_memory, out_of_memory
from train.engine.runtime import Runtime
from train.tasks.base import Task, build_task

HEADROOM = 0.1  # share of the free memory left for fragmentation, communication and batches on their way
ON_GPU = 2**30  # bytes left on a GPU for NCCL's buffers and compilation, which a trial of the plain network lacks


def settle_micro_batch(
    config: Config, order: Order, classes: tuple[str, ...], runtime: Runtime, resume: Resume
) -> tuple[Config, Order, list[str]]:
    """`config` and `order` with a number in place of "auto", and sentences for the log; every rank calls this and gets
    the same.

    The number is that of the checkpoint that the run goes on from, because mixup and dropout act inside a micro-batch;
    else the largest size that fits on all ranks. Raises ConfigError if that number cannot be used here, or nothing
    fits.
    """
    if config.train.micro_batch != "auto":
        return config, order, []
    before: list = [None]
    if runtime.is_main:
        try:
            before[0] = _before(resume)
        except (ConfigError, StorageError) as error:
            before[0] = error
    dist.broadcast_object_list(before)
    if isinstance(before[0], Exception):
        raise before[0]
    if before[0]:
        size, sentence = before[0], f"train.micro_batch: {before[0]}, as this run has had it before"
    else:
        size, sentence = _largest(build_task(config, classes), order, runtime)
    try:
        order = replace(order, micro_batch=size)
        order.share(runtime.rank, runtime.world)
    except ValueError as error:
        origin = f"was {size} before" if before[0] else f"auto came to {size}"
        raise ConfigError(f"train.micro_batch {origin}: {error}") from error
    config.check_warmup(order.steps_per_epoch)
    return config.with_micro_batch(size), order, [sentence]


def _before(resume: Resume) -> int | None:
    """The size of the checkpoint that the run goes on from; None if it begins."""
    damaged = None
    for path in resume.candidates():
        try:
            return settings_of(path, read_info(path)).train.micro_batch
        except ConfigError as error:
            damaged = damaged or error
    if damaged:
        raise damaged
    return None


def _largest(task: Task, order: Order, runtime: Runtime) -> tuple[int, str]:
    """Find it by bisection among the sizes that give every rank the same number of micro-batches, and that the order
    of the samples allows.
    """
    config, sizes, above = task.config, [], ""
    share = config.train.global_batch // runtime.world
    for size in range(config.smallest_micro_batch, share + 1):
        if share % size == 0:
            try:
                replace(order, micro_batch=size)
                sizes.append(size)
            except ValueError as error:
                above = above or f" ({size} does not: {error})"
    fitting, too_large = -1, len(sizes)
    model = task.build_model().to(runtime.device, DTYPES[config.train.precision])

    def fits(size: int) -> bool:
        everywhere = torch.tensor(_fits(model, task, size), dtype=torch.uint8, device=runtime.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        return bool(everywhere)

    # The first trial lets libraries start their threads and fill their caches, before the memory is measured. At ZeRO 3
    # the weights are partitioned, which these trials of a whole model do not show: more would fit than is found.
    if fits(sizes[0]):
        beside = optimizer_bytes(model, config, runtime) + ON_GPU * (runtime.device.type == "cuda")
        tried = sum(parameter.nbytes for parameter in model.parameters())  # gradients without their copies
        beside += max(0, gradient_bytes(model, config, runtime, task.views().most_shapes) - tried)
        free = (1 - HEADROOM) * free_memory(runtime.device) - beside
        with at_most(free, runtime.device):
            while too_large - fitting > 1:
                middle = (fitting + too_large) // 2
                fitting, too_large = (middle, too_large) if fits(sizes[middle]) else (fitting, middle)
    if fitting < 0:
        raise ConfigError(
            f"train.micro_batch=auto: not even {sizes[0]} fits into memory; use train.activation_checkpointing=true, "
            "a higher zero.stage, "
            "or a smaller model"
        )
    if too_large < len(sizes):
        above = f" ({sizes[too_large]} does not)"
    return sizes[fitting], f"train.micro_batch: {sizes[fitting]} is the largest that fits{above}"


def _fits(model: nn.Module, task: Task, size: int) -> bool:
    try:
        weight = next(model.parameters())
        task.example_loss(model(task.example(size, weight.device, weight.dtype))).backward()
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
