"""A model trained with DeepSpeed ZeRO.

Only this module, deepspeed_config.py (settings) and deepspeed_internals.py (undocumented attributes) depend on
DeepSpeed.

DeepSpeed keeps the fp32 weights (the *masters*) and the optimizer's moments in a different place at every ZeRO stage.
`Engine` presents them in one form: a list of `Fragment`s, flat pieces of named parameters. EMA and checkpoints work on
fragments, so their code is the same at every stage.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from train.config import Config, ConfigError
from train.engine import deepspeed_internals as internals
from train.engine.batch_norm import accept_low_precision
from train.engine.deepspeed_config import checked_here, deepspeed_config, zero_stage
from train.engine.loss_scale import LossScale
from train.engine.optimizer import build_optimizer, initial_state

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`.

    `master` and `moments` are 1-D views of its fp32 weights and of the optimizer's moments, by their names in torch.
    """

    name: str
    start: int
    master: Tensor
    moments: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.master.numel()


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step, equal on all ranks.

    grad_norm: norm of the whole gradient before clipping. skipped: 1 if that norm is not finite, in which case the step
    changed nothing; else 0. Both are fp32 scalars on the device; reading one on the host waits for the whole step.
    """

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its fp32 state as fragments.

    The weights are cast to `config.train.precision`; their fp32 masters equal the weights of `model` bitwise. Gradients
    are summed over micro-batches and ranks in fp32. The process group must exist.

    accumulation: micro-batches per rank and step. Raises ConfigError if the device does not support a setting.
    """

    def __init__(self, model: nn.Module, config: Config, accumulation: int, device: torch.device):
        deepspeed = _import_deepspeed()
        if config.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision=fp16 is not supported by this device; use bf16 or fp32")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.stage, self.offload = zero_stage(config, self.world), config.zero.offload
        self.dtype = DTYPES[config.train.precision]
        self.device, self.clip_grad = device, config.optimizer.clip_grad
        self._checked_here = checked_here(config, self.world)
        # Divide losses by the number of micro-batches of all ranks before anything is rounded, so that the result does
        # not depend on the number of ranks. ZeRO 3 divides by the number of ranks itself.
        self._divisor = accumulation if self.stage == 3 else accumulation * self.world
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}

        originals = self._cast(model)
        self._base = base = build_optimizer(model.to(device), config.optimizer)
        self._groups = [list(group["params"]) for group in base.param_groups]
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=base, config=deepspeed_config(config, accumulation, device)
        )
        self._optimizer = self._engine.optimizer
        # ZeRO 0 in half precision only: the flat fp32 sum of this step's gradients so far, and (our fp32 masters, the
        # network's weights).
        self._sum: Tensor | None = None
        self._copies: tuple[list[Tensor], list[Tensor]] | None = None
        if self.stage == 0:
            self._masters = self._own_masters()
        # A single rank has nothing to reduce; _add_up reduces our own sum.
        internals.set_gradient_reduction(self._engine, self.stage > 0 or (self.world > 1 and not self._copies))
        fp16 = self.dtype == torch.float16
        self._loss_scale = LossScale(device) if fp16 and self._checked_here else None
        if fp16 and not self._checked_here:
            internals.keep_minimum_loss_scale(self._optimizer)
        # Batch size that the network is compiled for (another one would be compiled anew); 0 without compilation.
        self._compiled_for = config.train.micro_batch if config.train.compile else 0
        if config.train.compile:
            self._compile(config.train.cuda_graphs, accumulation)
        # Create the optimizer's state now, not lazily at the first step, so that loading a checkpoint always has
        # tensors to fill.
        groups = {
            parameter: group
            for group, parameters in zip(base.param_groups, self._groups, strict=True)
            for parameter in parameters
        }
        self._moments = {
            master: initial_state(base, groups[parameters[0]], master) for parameters, master, _ in self._layout()
        }
        base.state.update(self._moments)
        if originals:  # DeepSpeed made the masters from the rounded weights
            for fragment in self.fragments(everything=True):
                fragment.master.copy_(
                    originals[fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel]
                )

    @property
    def module(self) -> nn.Module:
        """The model itself. To run it, call the engine: ZeRO 3 gathers weights in the engine's hooks."""
        return self._engine.module

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name: whole on every rank, in the type they were created with."""
        saved = self.module.state_dict()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in saved}

    def __call__(self, inputs: Tensor) -> Any:
        """Output of the network for a batch.

        inputs: a tensor of any floating type, batch first, cast to the network's precision. Returns what the network
        returns: a structure of tensors, each batch first.
        """
        count = len(inputs)
        if count < self._compiled_for:  # the last batch of an evaluation: fill up to the compiled size
            inputs = nn.functional.pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, self._compiled_for - count))
        return tree_map_only(Tensor, lambda output: output[:count], self._engine(inputs.to(self.dtype)))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss to the step's gradient, in fp32.

        The last call of a step also sums over the ranks.

        A loss that is not finite makes the gradient NaN, and thereby the norm on all ranks: the ranks agree to skip the
        step without a message or a synchronisation.
        """
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        if self._loss_scale:
            loss = loss * self._loss_scale.value
        self._engine.backward(loss / self._divisor, scale_wrt_gas=False)
        if self._copies:
            self._add_up(self._copies[1])

    @torch.no_grad()
    def step(self, lr: float) -> StepResult | None:
        """Finish a micro-batch.

        After the step's last one, clip the gradient and update the weights; before, return None.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if not self._checked_here:
            self._engine.step()
            skipped = not self._engine.was_step_applied()
            if skipped and self.stage < 3:
                internals.drop_reduced_gradients(self._optimizer)
            norm = torch.nan if skipped else self._engine.get_global_grad_norm()
            return StepResult(
                torch.as_tensor(norm).float(), torch.full((), float(skipped), device=next(iter(self._moments)).device)
            )
        norm, scale = self._gradient_norm(), None
        if self._loss_scale:
            scale = self._loss_scale.value
            norm = norm / scale
        skipped = norm.isfinite().logical_not().float()
        if self.clip_grad:
            clip = ((norm + 1e-6) / self.clip_grad).clamp(min=1)
            scale = clip if scale is None else clip * scale
        # As torch.amp's scaler does: torch's fused optimizers divide gradients by grad_scale, and change nothing if
        # found_inf is 1.
        self._base.grad_scale, self._base.found_inf = scale, skipped
        if self._copies:
            masters, weights = self._copies
            for master, gradient in zip(masters, self._sum.split([master.numel() for master in masters]), strict=True):
                master.grad = gradient.view(master.shape)
        self._engine.step()
        if self._copies:
            torch._foreach_copy_(weights, masters)
            self._base.zero_grad()
            self._sum = None
        if self._loss_scale:
            self._loss_scale.update(skipped)
        return StepResult(norm, skipped)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager: evaluation mode, without gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def fragments(self, *, everything: bool = False) -> list[Fragment]:
        """This rank's share of all weights, in a fixed order.

        The shares of all ranks together contain every element exactly once.

        everything: all that this rank holds, which is what loading must fill. It is more than the share at ZeRO 0 only,
        where every rank holds every weight.
        """
        pieces = []
        for group, master, places in self._layout():
            share = range(master.numel())
            if self.stage == 0 and not everything:
                share = _share(master.numel(), self.rank, self.world)
            for parameter, (start, offset, numel) in zip(group, places, strict=True):
                low, high = max(offset, share.start), min(offset + numel, share.stop)
                if low < high:
                    flat = {key: value.view(-1)[low:high] for key, value in self._moments[master].items() if value.ndim}
                    pieces.append(
                        Fragment(self.names[parameter], start + low - offset, master.detach().view(-1)[low:high], flat)
                    )
        return pieces

    def publish(self) -> None:
        """Set the model's weights on all ranks from the masters, of which each rank contributes its share.

        All ranks call this.
        """
        if self.stage:
            internals.publish_masters(self._optimizer, self.stage)
        else:
            for (parameter,), master, _ in self._layout():
                self._gather_shares(master)
                parameter.data.copy_(master.detach().view(parameter.shape))

    def optimizer_step_count(self) -> int:
        """Number of steps applied by the optimizer, without fp16's skipped ones; 0 if it does not count them (SGD)."""
        return max((int(state["step"]) for state in self._moments.values() if "step" in state), default=0)

    def set_optimizer_step_count(self, count: int) -> None:
        """Set the number of steps applied, as read from a checkpoint."""
        for state in self._moments.values():
            if "step" in state:
                state["step"].fill_(count)

    def loss_scale_state(self) -> dict[str, float]:
        """State of the dynamic loss scale (fp16); empty in other precisions."""
        if self.dtype != torch.float16:
            return {}
        return self._loss_scale.state() if self._loss_scale else internals.loss_scale_state(self._optimizer)

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """Restore the state of the dynamic loss scale; no effect if `state` is empty or the precision is not fp16."""
        if self._loss_scale and state:
            self._loss_scale.load(state)
        elif self.dtype == torch.float16:
            internals.set_loss_scale_state(self._optimizer, state)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks. The model is unusable afterwards."""
        self._engine.destroy()

    def _layout(self) -> Iterator[internals.Partition]:
        """This rank's fp32 tensors, each with its parameters and their places in it."""
        if self.stage:
            yield from internals.partitions(self._optimizer, self.stage, self.rank)
            return
        for group, group_masters in zip(self._groups, self._masters, strict=True):
            for parameter, master in zip(group, group_masters, strict=True):
                yield [parameter], master, [internals.Place(0, 0, parameter.numel())]

    def _compile(self, cuda_graphs: bool, accumulation: int) -> None:
        """Compile the model at its first call in training and in evaluation. Results differ by rounding only."""
        if cuda_graphs and (self.device.type != "cuda" or accumulation > 1):
            raise ConfigError(
                "train.cuda_graphs needs a GPU, and one micro-batch per rank and step: "
                "a second one would overwrite the gradients"
            )
        self.module.compile(**compile_settings(cuda_graphs))

    def _cast(self, model: nn.Module) -> dict[str, Tensor]:
        """Cast the weights of `model`; returns copies of the original weights on the host (none in fp32)."""
        if self.dtype == torch.float32:
            return {}
        accept_low_precision(model)
        originals = {name: parameter.detach().to("cpu", copy=True) for parameter, name in self.names.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return originals

    def _own_masters(self) -> list[list[Tensor]]:
        """ZeRO 0: the fp32 masters by parameter group.

        In half precision they are new tensors, which replace the weights in the optimizer; DeepSpeed uses that
        optimizer unchanged.
        """
        if self.dtype == torch.float32:
            return self._groups
        for group in self._base.param_groups:
            group["params"] = [nn.Parameter(parameter.detach().float()) for parameter in group["params"]]
        masters = [group["params"] for group in self._base.param_groups]
        self._copies = sum(masters, []), sum(self._groups, [])
        return masters

    @torch.no_grad()
    def _add_up(self, weights: list[Tensor]) -> None:
        """ZeRO 0 in half precision: add a micro-batch's gradients to the sum; after the last one, sum over ranks."""
        gradient = torch.cat([weight.grad.reshape(-1) for weight in weights])
        self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)
        for weight in weights:
            weight.grad = None
        if self.world > 1 and self._engine.is_gradient_accumulation_boundary():
            dist.all_reduce(self._sum)

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient; call it after the last `backward` of a step."""
        if self.stage:  # each rank has the gradients of its share
            gradients = internals.reduced_gradients(self._optimizer)
        elif self._copies:
            gradients = self._sum.split([weight.numel() for weight in self._copies[1]])
        else:
            gradients = [parameter.grad for parameter in self.names]
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
        if self.stage:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _gather_shares(self, master: Tensor) -> None:
        """ZeRO 0: fill `master` with every rank's share of it, in place."""
        flat = master.detach().view(-1)
        width = -(-flat.numel() // self.world)
        mine = flat.new_zeros(width)
        share = _share(flat.numel(), self.rank, self.world)
        mine[: len(share)] = flat[share.start : share.stop]
        whole = flat.new_empty(width * self.world)
        dist.all_gather_into_tensor(whole, mine)
        flat.copy_(whole[: flat.numel()])


def compile_settings(cuda_graphs: bool = False) -> dict:
    """Arguments of `nn.Module.compile` for training."""
    options = {
        "fallback_random": True,  # dropout and drop-path draw the same random numbers as without compilation
        "deterministic": True,  # no choice by timing: after a restart it might choose differently
        "triton.cudagraphs": cuda_graphs,
    }
    return {"options": options, "dynamic": False}


def _share(numel: int, rank: int, world: int) -> range:
    """ZeRO 0: the elements of a tensor that belong to a rank's share."""
    width = -(-numel // world)
    return range(min(rank * width, numel), min((rank + 1) * width, numel))


def _import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    internals.skip_shared_memory_extension()
    return deepspeed


def init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL on GPUs, gloo on CPUs.

    timeout: of a collective, in this group and in all groups made later.
    """
    deepspeed = _import_deepspeed()
    # DeepSpeed creates groups of its own without a timeout, so change torch's default.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def destroy_process_group() -> None:
    """Leave the process group. DeepSpeed must do it, or it would use the old groups in this process's next run."""
    _import_deepspeed().comm.destroy_process_group()
