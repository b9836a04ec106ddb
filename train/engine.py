"""DeepSpeed, and the only file that knows it.

DeepSpeed keeps the fp32 weights (the *master*) and the optimizer's moments in a different place at every ZeRO stage. `Engine` shows
them in one form: a list of `Fragment`s, flat pieces of named parameters. EMA and checkpoints work on fragments, and so are the same
code at every stage. Facts about DeepSpeed 0.19 that this file relies on are in comments where they matter.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.batch_norm import accept_low_precision
from train.config import Config, ConfigError
from train.optimizer import build_optimizer, initial_state

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# DeepSpeed's default buckets of 5e8 elements would take gigabytes of a laptop's memory; these still hide a network's latency.
BUCKET_ELEMENTS = 25_000_000


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`: views of its fp32 master and of the optimizer's moments."""

    name: str
    start: int
    master: Tensor
    moments: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.master.numel()


@dataclass(frozen=True)
class StepResult:
    """Norm of the whole gradient before clipping; `skipped` where it is not finite, on all ranks alike, and nothing was changed."""

    grad_norm: float
    skipped: bool


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its fp32 state as fragments.

    `accumulation` is the number of micro-batches a rank takes per step. Weights are cast to `config.train.precision`; the process
    group must exist.
    """

    def __init__(self, model: nn.Module, config: Config, accumulation: int, device: torch.device):
        deepspeed = _import_deepspeed()
        if config.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision=fp16 is not supported by this device; use bf16 or fp32")
        self.stage, self.offload = config.zero.stage, config.zero.offload
        self.dtype = DTYPES[config.train.precision]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.clip_grad = config.optimizer.clip_grad
        # ZeRO 0 in fp32 has no wrapper around the optimizer, and DeepSpeed then reports no gradient norm: we clip.
        self._plain = self.stage == 0 and self.dtype == torch.float32
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}

        if self.dtype != torch.float32:
            accept_low_precision(model)
        base = build_optimizer(model.to(device), config.optimizer)
        self._groups = [list(group["params"]) for group in base.param_groups]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=self._settings(config, accumulation))
        self._optimizer = self._engine.optimizer
        # Present from the start, so that loading needs no case of its own; it also undoes the dummy step with which DeepSpeed
        # starts ZeRO 0 in half precision, and which would leave Adam's step count one too high.
        groups = {parameter: group for group, parameters in zip(base.param_groups, self._groups, strict=True) for parameter in parameters}
        self._moments = {master: initial_state(base, groups[parameters[0]], master) for parameters, master, _ in self._layout()}
        base.state.update(self._moments)

    @property
    def module(self) -> nn.Module:
        """The model itself. Call the engine, not this: ZeRO 3 gathers weights in the engine's hooks."""
        return self._engine.module

    def buffers(self) -> dict[str, Tensor]:
        """What the model's state dict has beside weights, by name: whole on every rank, and in the type it was made in."""
        saved = self.module.state_dict()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in saved}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of normalised images [m, 3, S, S], any float type."""
        return self._engine(images.to(self.dtype))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss; the last of a step also averages it over ranks.

        A loss that is not finite makes the gradient so, and with it the norm that all ranks see: no message and no waiting is needed.
        """
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def step(self, lr: float) -> StepResult:
        """Finish a micro-batch; after the step's last one: clip, update the weights."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return StepResult(0.0, False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm, skipped = math.nan, False
        if self._plain:  # everywhere else DeepSpeed looks whether the norm is finite
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad or float("inf")))
            skipped = not math.isfinite(norm)
            if skipped:
                self.module.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
        self._engine.step()
        skipped = skipped or not self._engine.was_step_applied()
        if not self._plain and not skipped:
            norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, without gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def fragments(self, *, everything: bool = False) -> list[Fragment]:
        """This rank's share of all weights: over all ranks every element exactly once, in a fixed order.

        `everything` adds what this rank holds beyond its share (ZeRO 0 holds every weight on every rank): what loading must fill.
        """
        pieces = []
        for group, master, offsets in self._layout():
            share = range(master.numel())
            if self.stage == 0 and not everything:
                share = _share(master.numel(), self.rank, self.world)
            for parameter, (start, offset, numel) in zip(group, offsets, strict=True):
                low, high = max(offset, share.start), min(offset + numel, share.stop)
                if low < high:
                    flat = {key: value.view(-1)[low:high] for key, value in self._moments[master].items() if value.ndim}
                    pieces.append(Fragment(self.names[parameter], start + low - offset, master.detach().view(-1)[low:high], flat))
        return pieces

    def publish(self) -> None:
        """Make the model's weights, on all ranks, what the shares of the master say."""
        if self.stage == 3:
            self._optimizer._partition_all_parameters()  # or weights that are gathered at the moment would stay what they were
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if self._optimizer.persistent_parameters:  # small ones that every rank keeps whole
                self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)
        elif self.stage:
            self._optimizer.update_lp_params()
        else:
            for (parameter,), master, _ in self._layout():
                self._gather_shares(master)
                parameter.data.copy_(master.detach().view(parameter.shape))

    def optimizer_step_count(self) -> int:
        """Steps the optimizer has taken (fp16's skipped ones not counted), or 0 where it does not count (SGD)."""
        return max((int(state["step"]) for state in self._moments.values() if "step" in state), default=0)

    def set_optimizer_step_count(self, count: int) -> None:
        for state in self._moments.values():
            if "step" in state:
                state["step"].fill_(count)

    def loss_scale_state(self) -> dict[str, float]:
        """The dynamic loss scale's numbers (fp16); empty in other precisions."""
        if self.dtype != torch.float16:
            return {}
        return {key: value for key, value in vars(self._scaler()).items() if isinstance(value, int | float)}

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        for key, value in state.items():
            setattr(self._scaler(), key, value)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks; the model is of no use afterwards."""
        self._engine.destroy()

    def _settings(self, config: Config, accumulation: int) -> dict:
        zero = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        }
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self._plain else (self.clip_grad or 0.0),
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.dtype == torch.float16},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, and compiles nothing at start-up
        }

    def _layout(self) -> Iterator[tuple[list[nn.Parameter], Tensor, list[tuple[int, int, int]]]]:
        """Per fp32 tensor of this rank: its parameters, itself, and for each parameter (first element held, its offset here, numel)."""
        optimizer = self._optimizer
        if self.stage == 3:
            for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                offset, places = 0, []
                for parameter in group:
                    part = parameter.ds_tensor.ds_numel  # the same on all ranks: the last one's may be padding in part
                    start = min(self.rank * part, parameter.ds_numel)
                    places.append((start, offset, min(part, parameter.ds_numel - start)))
                    offset += part
                yield group, master, places
        elif self.stage:
            for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
                group = optimizer.round_robin_bit16_groups[index]
                first = self.rank * optimizer.partition_size[index]
                places = []
                for parameter, offset in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
                    low = min(max(offset, first), first + master.numel())
                    high = min(max(offset + parameter.numel(), first), first + master.numel())
                    places.append((low - offset, low - first, high - low))
                yield group, master, places
        else:
            masters = self._groups if self._plain else optimizer.fp32_groups
            for group, group_masters in zip(self._groups, masters, strict=True):
                for parameter, master in zip(group, group_masters, strict=True):
                    yield [parameter], master, [(0, 0, parameter.numel())]

    def _gather_shares(self, master: Tensor) -> None:
        """ZeRO 0: put every rank's share of `master` together again, in place."""
        flat = master.detach().view(-1)
        width = -(-flat.numel() // self.world)
        mine = flat.new_zeros(width)
        share = _share(flat.numel(), self.rank, self.world)
        mine[: len(share)] = flat[share.start : share.stop]
        whole = flat.new_empty(width * self.world)
        dist.all_gather_into_tensor(whole, mine)
        flat.copy_(whole[: flat.numel()])

    def _scaler(self) -> object:
        return self._optimizer.loss_scaler if self.stage else self._optimizer.loss_scale_config


def _share(numel: int, rank: int, world: int) -> range:
    width = -(-numel // world)
    return range(min(rank * width, numel), min((rank + 1) * width, numel))


def _import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Otherwise DeepSpeed compiles a C++ extension for most of a minute that only its inference uses.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_process_group(device: torch.device) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL on GPUs, gloo on CPUs."""
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
