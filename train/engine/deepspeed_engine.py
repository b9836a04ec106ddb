"""A model trained with DeepSpeed ZeRO.

Only this module, deepspeed_config.py (settings) and deepspeed_internals.py (undocumented attributes) depend on
DeepSpeed.

DeepSpeed keeps the fp32 weights (the *masters*) and the optimizer's moments in a different place at every ZeRO stage.
`Engine` presents them in one form: a list of `Fragment`s, flat pieces of named parameters. EMA and checkpoints work on
fragments, so their code is the same at every stage.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from train.config import Config, ConfigError
from train.engine import deepspeed_internals as internals
from train.engine.batch_norm import accept_low_precision
from train.engine.deepspeed_config import deepspeed_config, gradients_here, zero_stage
from train.engine.deepspeed_start import import_deepspeed
from train.engine.flat_masters import FlatMasters
from train.engine.gradients import Gradients
from train.engine.graphs import Replayed, graphs_wanted
from train.engine.loss_scale import INITIAL, LossScale
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


# The losses of a micro-batch, from the network and the task's inputs: the first is trained on.
Losses = Callable[[Callable[..., Any], Any], Sequence[Tensor]]


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its fp32 state as fragments.

    The weights are cast to `config.train.precision`; their fp32 masters equal the weights of `model` bitwise. Gradients
    are summed over micro-batches and ranks in fp32. The process group must exist.

    At ZeRO 0 to 2 the gradient is computed and summed here (gradients.py), without DeepSpeed's hooks, so that a
    micro-batch can be replayed as a CUDA graph. At ZeRO 3 and with offloading DeepSpeed does it.

    accumulation: micro-batches per rank and step. shapes: how many shapes the inputs of training may have. Raises
    ConfigError if the device does not support a setting.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        config: Config,
        accumulation: int,
        device: torch.device,
        shapes: int = 1,
    ):
        deepspeed = import_deepspeed()
        if config.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision=fp16 is not supported by this device; use bf16 or fp32")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.stage, self.offload = zero_stage(config, self.world), config.zero.offload
        self.dtype = DTYPES[config.train.precision]
        self.device, self.clip_grad = device, config.optimizer.clip_grad
        self.gradients_here = gradients_here(config, self.world)
        self._losses, self._accumulation, self._accumulated = losses, accumulation, 0
        # Divide losses by the number of micro-batches of all ranks before anything is rounded, so that the result does
        # not depend on the number of ranks. ZeRO 3 averages over the ranks itself, after the backward pass.
        self._averaged = self.world if self.stage == 3 else 1
        self._divisor = accumulation * self.world // self._averaged
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}

        originals = self._cast(model)
        self._base = base = build_optimizer(model.to(device), config.optimizer)
        settings = {parameter: group for group in base.param_groups for parameter in group["params"]}
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=base, config=deepspeed_config(config, accumulation, device)
        )
        self._optimizer = self._engine.optimizer
        if self.stage == 0:
            self._masters = FlatMasters(base, self.rank, self.world)
        if self.gradients_here:
            flat = internals.flat_groups(self._optimizer) if self.stage else self._masters.groups
            self._gradients = Gradients(flat, self.stage, self.world)
            self._weights = [parameter for group in flat for parameter in group.parameters]
        # A GPU adds a long sum as a tree. A CPU adds one element after the other, which loses digits in fp32.
        self._norm_at_once = device.type == "cuda"
        fp16 = self.dtype == torch.float16
        self._loss_scale = LossScale(device) if fp16 and self.gradients_here else None
        if fp16 and not self.gradients_here:
            internals.keep_minimum_loss_scale(self._optimizer)
            self.set_loss_scale_state({"cur_scale": INITIAL})
        # Batch size that the network is compiled for (another one would be compiled anew); 0 without compilation.
        self._compiled_for = config.train.micro_batch if config.train.compile else 0
        self._evaluates_as_it_is = False
        if config.train.compile:
            allow_shapes(shapes)
            self.module.compile(**compile_settings())  # at its first call; results differ by rounding only
        self.graphs, self.about_graphs = graphs_wanted(config, device, self.gradients_here, shapes)
        self._differentiate, self._evaluate = self._differentiated, self._network
        if self.graphs:
            self._differentiate, self._evaluate = Replayed(self._differentiated), Replayed(self._network)
        # Create the optimizer's state now, not lazily at the first step, so that loading a checkpoint always has
        # tensors to fill.
        self._moments = {
            master: initial_state(base, settings[parameters[0]], master) for parameters, master, _ in self._layout()
        }
        base.state.update(self._moments)
        if originals:  # the masters were made from the rounded weights
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

    def whole(self) -> dict[str, Tensor]:
        """What belongs to the state beside the fragments, whole on every rank: buffers, and weights that are not
        trained (not at ZeRO 3), in the network's precision.
        """
        parameters = self.module.named_parameters()
        return self.buffers() | {name: value.detach() for name, value in parameters if not value.requires_grad}

    def __call__(self, inputs: Tensor) -> Any:
        """Output of the network for a batch.

        inputs: a tensor of any floating type, batch first, cast to the network's precision. Returns what the network
        returns: a structure of tensors, each batch first.
        """
        if self._evaluates_as_it_is:
            with torch.compiler.set_stance("force_eager"):
                return self._network(inputs)
        count = len(inputs)
        if count < self._compiled_for:  # the last batch of an evaluation: fill up to the compiled size
            inputs = nn.functional.pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, self._compiled_for - count))
        network = self._network if self.module.training else self._evaluate
        return tree_map_only(Tensor, lambda output: output[:count], network(inputs))

    def _network(self, inputs: Tensor) -> Any:
        return (self.module if self.gradients_here else self._engine)(inputs.to(self.dtype))

    def accumulate(self, inputs: Any) -> Tensor:
        """Add the gradient of one micro-batch's mean loss to the step's gradient, in fp32; returns all its losses.

        inputs: a structure of tensors, for `losses`. `step` must follow.

        A loss that is not finite makes the gradient NaN, and thereby the norm on all ranks: the ranks agree to skip the
        step without a message or a synchronisation.
        """
        if self.gradients_here:
            losses, self._newest = self._differentiate(inputs)
            return losses
        losses = self._losses(self, inputs)
        self._engine.backward(_nan_unless_finite(losses[0]) / self._divisor, scale_wrt_gas=False)
        return torch.stack([loss.detach() for loss in losses])

    def _differentiated(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The losses of a micro-batch, and the gradient of the first one, flat."""
        losses = self._losses(self, inputs)
        loss = _nan_unless_finite(losses[0])
        if self._loss_scale:
            loss = loss * self._loss_scale.value
        gradients = torch.autograd.grad(loss / self._divisor, self._weights, materialize_grads=True)
        return torch.stack([loss.detach() for loss in losses]), self._gradients.flatten(gradients)

    @torch.no_grad()
    def step(self, lr: float) -> StepResult | None:
        """Finish a micro-batch.

        After the step's last one, clip the gradient and update the weights; before, return None.
        """
        self._accumulated = (self._accumulated + 1) % self._accumulation
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if not self.gradients_here:
            return self._deepspeed_step()
        self._gradients.add(self._newest)
        self._newest = None
        if self._accumulated:
            return None
        gradient = self._gradients.take()
        norm, scale = self._gradient_norm(gradient), None
        if self._loss_scale:
            scale = self._loss_scale.value
            norm = norm / scale
        skipped = (norm - norm).ne_(0)  # 1 unless the norm is finite: x - x is NaN for infinity and NaN
        if self.clip_grad:
            clip = ((norm + 1e-6) / self.clip_grad).clamp(min=1)
            scale = clip if scale is None else clip * scale
        # As torch.amp's scaler does: torch's fused optimizers divide gradients by grad_scale, and change nothing if
        # found_inf is 1.
        self._base.grad_scale, self._base.found_inf = scale, skipped
        if self.stage:
            internals.set_reduced_gradients(self._optimizer, self._gradients.by_group(gradient))
        else:
            self._masters.set_gradient(gradient)
        self._engine.step()
        if self.stage == 0:
            self._masters.finish_step()
        if self._loss_scale:
            self._loss_scale.update(skipped)
        return StepResult(norm, skipped)

    def _deepspeed_step(self) -> StepResult | None:
        """`step` at ZeRO 3 and with offloading."""
        self._engine.step()
        if self._accumulated:
            return None
        skipped = not self._engine.was_step_applied()
        if skipped and self.stage < 3:
            internals.drop_reduced_gradients(self._optimizer)
        norm = torch.nan if skipped else self._engine.get_global_grad_norm()
        return StepResult(
            torch.as_tensor(norm).float(), torch.full((), float(skipped), device=next(iter(self._moments)).device)
        )

    @contextlib.contextmanager
    def evaluating(self, compiled: bool = True) -> Iterator[None]:
        """Context manager: evaluation mode, without gradients.

        compiled: False for images of many shapes, each of which would be compiled and recorded anew.
        """
        self._engine.eval()
        self._evaluates_as_it_is = not compiled
        try:
            with torch.no_grad():
                yield
        finally:
            self._evaluates_as_it_is = False
            self._engine.train()

    def fragments(self, *, everything: bool = False) -> list[Fragment]:
        """This rank's share of all weights, in a fixed order.

        The shares of all ranks together contain every element exactly once.

        everything: all that this rank holds, which is what loading must fill. It is more than the share at ZeRO 0 only,
        where every rank holds every weight.
        """
        return [fragment for _, fragments in self.shares(everything=everything) for fragment in fragments]

    def shares(self, *, everything: bool = False) -> Iterator[tuple[Tensor, list[Fragment]]]:
        """The flat fp32 tensors that make up this rank's share of the weights, each with the fragments in it."""
        for group, master, places in self._layout():
            share = range(master.numel())
            if self.stage == 0 and not everything:
                share = self._masters.share(master.numel())
            flat, fragments = master.detach().view(-1), []
            for parameter, (start, offset, numel) in zip(group, places, strict=True):
                low, high = max(offset, share.start), min(offset + numel, share.stop)
                if low < high:
                    moments = {
                        key: value.view(-1)[low:high] for key, value in self._moments[master].items() if value.ndim
                    }
                    fragments.append(Fragment(self.names[parameter], start + low - offset, flat[low:high], moments))
            yield flat[share.start : share.stop], fragments

    def publish(self) -> None:
        """Set the model's weights on all ranks from the masters, of which each rank contributes its share.

        All ranks call this.
        """
        if self.stage:
            internals.publish_masters(self._optimizer, self.stage)
        else:
            self._masters.publish()

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
        if self._loss_scale:
            return self._loss_scale.state()
        return internals.loss_scale_state(self._optimizer, self._averaged)

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """Restore the state of the dynamic loss scale; no effect if `state` is empty or the precision is not fp16."""
        if self._loss_scale and state:
            self._loss_scale.load(state)
        elif self.dtype == torch.float16:
            internals.set_loss_scale_state(self._optimizer, state, self._averaged)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks. The model is unusable afterwards."""
        self._engine.destroy()

    def _layout(self) -> Iterator[internals.Partition]:
        """This rank's fp32 tensors, each with its parameters and their places in it."""
        return (
            internals.partitions(self._optimizer, self.stage, self.rank) if self.stage else self._masters.partitions()
        )

    def _cast(self, model: nn.Module) -> dict[str, Tensor]:
        """Cast the weights of `model`; returns copies of the original weights on the host (none in fp32)."""
        if self.dtype == torch.float32:
            return {}
        accept_low_precision(model)
        originals = {name: parameter.detach().to("cpu", copy=True) for parameter, name in self.names.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return originals

    def _gradient_norm(self, gradient: Tensor) -> Tensor:
        """Norm of the whole gradient, of which this rank has `gradient` (see `Gradients.take`), as an fp32 scalar."""
        if self._norm_at_once:
            norm = torch.linalg.vector_norm(gradient)
        else:
            norms = torch._foreach_norm(self._by_parameter(gradient), 2, dtype=torch.float32)
            norm = torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)
        if self.stage:
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm.float()

    def _by_parameter(self, gradient: Tensor) -> list[Tensor]:
        """The parts of `gradient` that belong to each parameter."""
        all_places = [places for _, _, places in self._layout()] if self.stage else self._masters.places()
        return [
            part[place.offset : place.offset + place.numel]
            for part, places in zip(self._gradients.by_group(gradient), all_places, strict=True)
            for place in places
            if place.numel
        ]


def compile_settings() -> dict:
    """Arguments of `nn.Module.compile` for training."""
    options = {
        "fallback_random": True,  # dropout and drop-path draw the same random numbers as without compilation
        "deterministic": True,  # no choice by timing: after a restart it might choose differently
    }
    return {"options": options, "dynamic": False}


def allow_shapes(count: int) -> None:
    """Let torch.compile compile a network for so many shapes, beside what else it compiles anew for.

    Beyond its limit, of 8, it would compute without compilation, and not say so.
    """
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, 7 + count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 7 + count)


def _nan_unless_finite(loss: Tensor) -> Tensor:
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
