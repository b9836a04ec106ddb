"""DeepSpeed, and with deepspeed_config.py the only file that knows it.

DeepSpeed keeps the fp32 weights (the *master*) and the optimizer's moments in a different place at every ZeRO stage. `Engine` shows
them in one form: a list of `Fragment`s, flat pieces of named parameters. EMA and checkpoints work on fragments, and so are the same
code at every stage. Facts about DeepSpeed 0.19 that this file relies on are in comments where they matter.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import Config, ConfigError
from train.engine.batch_norm import accept_low_precision
from train.engine.deepspeed_config import checked_here, deepspeed_config, zero_stage
from train.engine.loss_scale import LossScale
from train.engine.optimizer import build_optimizer, initial_state

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The state of DeepSpeed's loss scaler; what else it has are settings.
LOSS_SCALE = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


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
    """Norm of the whole gradient before clipping; `skipped` is 1 where it is not finite, on all ranks alike, and nothing was changed.

    Both are scalars on the device, fp32: to read one on the host is to wait for the whole step.
    """

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its fp32 state as fragments.

    `accumulation` is the number of micro-batches a rank takes per step. Weights are cast to `config.train.precision`; their fp32 masters
    are what `model` has, to the bit. Gradients of micro-batches and ranks are summed in fp32. The process group must exist.
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
        # What a loss is divided by: the same on any number of ranks, before anything is rounded. But ZeRO 3 divides by their number itself.
        self._divisor = accumulation if self.stage == 3 else accumulation * self.world
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}

        originals = self._cast(model)
        self._base = base = build_optimizer(model.to(device), config.optimizer)
        self._groups = [list(group["params"]) for group in base.param_groups]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=deepspeed_config(config, accumulation, device))
        self._optimizer = self._engine.optimizer
        self._sum: Tensor | None = None  # ZeRO 0 in half precision: of this step's gradients so far, flat, fp32
        self._copies: tuple[list[Tensor], list[Tensor]] | None = None  # fp32 masters that are ours, and the weights they are the masters of
        if self.stage == 0:
            self._masters = self._own_masters()
        # One rank has nothing to reduce; and our own sum is reduced in _add_up.
        self._engine.enable_backward_allreduce = self.stage > 0 or (self.world > 1 and not self._copies)
        fp16 = self.dtype == torch.float16
        self._loss_scale = LossScale(device) if fp16 and self._checked_here else None
        if fp16 and not self._checked_here:
            self._optimizer.loss_scaler.raise_error_at_min_scale = False  # the guard ends a run that does not recover
        self._compiled_for = config.train.micro_batch if config.train.compile else 0  # images: another number would be compiled again
        if config.train.compile:
            self._compile(config.train.cuda_graphs, accumulation)
        # Present from the start, so that loading needs no case of its own.
        groups = {parameter: group for group, parameters in zip(base.param_groups, self._groups, strict=True) for parameter in parameters}
        self._moments = {master: initial_state(base, groups[parameters[0]], master) for parameters, master, _ in self._layout()}
        base.state.update(self._moments)
        if originals:  # DeepSpeed has made the masters of the rounded weights
            for fragment in self.fragments(everything=True):
                fragment.master.copy_(originals[fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel])

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
        count = len(images)
        if count < self._compiled_for:  # the last ones of an evaluation
            images = nn.functional.pad(images, (0,) * 7 + (self._compiled_for - count,))
        return self._engine(images.to(self.dtype))[:count]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss to the step's, in fp32; the last of a step also adds up the ranks'.

        A loss that is not finite makes the gradient so, and with it the norm that all ranks see: no message and no waiting is needed.
        """
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        if self._loss_scale:
            loss = loss * self._loss_scale.value
        self._engine.backward(loss / self._divisor, scale_wrt_gas=False)
        if self._copies:
            self._add_up(self._copies[1])

    @torch.no_grad()
    def step(self, lr: float) -> StepResult | None:
        """Finish a micro-batch; after the step's last one: clip, update the weights. None before that."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if not self._checked_here:
            self._engine.step()
            skipped = not self._engine.was_step_applied()
            if skipped and self.stage < 3:
                self._optimizer.averaged_gradients.clear()  # DeepSpeed adds the next gradients to what it has not applied
            norm = torch.nan if skipped else self._engine.get_global_grad_norm()
            return StepResult(torch.as_tensor(norm).float(), torch.full((), float(skipped), device=next(iter(self._moments)).device))
        norm, scale = self._gradient_norm(), None
        if self._loss_scale:
            scale = self._loss_scale.value
            norm = norm / scale
        skipped = norm.isfinite().logical_not().float()
        if self.clip_grad:
            clip = ((norm + 1e-6) / self.clip_grad).clamp(min=1)
            scale = clip if scale is None else clip * scale
        # torch's fused optimizers divide by the one, and do nothing at all where the other is 1: what torch.amp's scaler uses.
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
        return self._loss_scale.state() if self._loss_scale else {key: getattr(self._optimizer.loss_scaler, key) for key in LOSS_SCALE}

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        if self._loss_scale and state:
            self._loss_scale.load(state)
        elif self.dtype == torch.float16:
            for key in LOSS_SCALE & state.keys():
                setattr(self._optimizer.loss_scaler, key, state[key])

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks; the model is of no use afterwards."""
        self._engine.destroy()

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
            for group, group_masters in zip(self._groups, self._masters, strict=True):
                for parameter, master in zip(group, group_masters, strict=True):
                    yield [parameter], master, [(0, 0, parameter.numel())]

    def _compile(self, cuda_graphs: bool, accumulation: int) -> None:
        """Have the model compiled when it is first called, for training and for evaluation; results differ from eager ones by rounding."""
        if cuda_graphs and (self.device.type != "cuda" or accumulation > 1):
            raise ConfigError("train.cuda_graphs needs a GPU, and one micro-batch a rank and step: the next would overwrite its gradients")
        self.module.compile(**compile_settings(cuda_graphs))

    def _cast(self, model: nn.Module) -> dict[str, Tensor]:
        """Cast the weights of `model`; returns what they were, on the host, or nothing in fp32."""
        if self.dtype == torch.float32:
            return {}
        accept_low_precision(model)
        originals = {name: parameter.detach().to("cpu", copy=True) for parameter, name in self.names.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return originals

    def _own_masters(self) -> list[list[Tensor]]:
        """ZeRO 0: in half precision the optimizer, which DeepSpeed has taken as it is, gets fp32 masters of the weights."""
        if self.dtype == torch.float32:
            return self._groups
        for group in self._base.param_groups:
            group["params"] = [nn.Parameter(parameter.detach().float()) for parameter in group["params"]]
        masters = [group["params"] for group in self._base.param_groups]
        self._copies = sum(masters, []), sum(self._groups, [])
        return masters

    @torch.no_grad()
    def _add_up(self, weights: list[Tensor]) -> None:
        """ZeRO 0 in half precision: add the gradients of one micro-batch to the step's sum, and after the last one the ranks' sums."""
        gradient = torch.cat([weight.grad.reshape(-1) for weight in weights])
        self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)
        for weight in weights:
            weight.grad = None
        if self.world > 1 and self._engine.is_gradient_accumulation_boundary():
            dist.all_reduce(self._sum)

    def _gradient_norm(self) -> Tensor:
        """Of the whole gradient, as it is after the last `backward` of a step."""
        if self.stage:  # each rank has those of its share
            gradients = [gradient for group in self._optimizer.averaged_gradients.values() for gradient in group]
        elif self._copies:
            gradients = self._sum.split([weight.numel() for weight in self._copies[1]])
        else:
            gradients = [parameter.grad for parameter in self.names]
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
        if self.stage:
            dist.all_reduce(square)
        return square.sqrt().float()

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


def compile_settings(cuda_graphs: bool = False) -> dict:
    """How models are compiled for training: the arguments of `nn.Module.compile`."""
    options = {
        "fallback_random": True,  # dropout and drop-path stay what torch.manual_seed makes them without compilation
        "deterministic": True,  # nothing is chosen by timing, which would choose otherwise after a restart
        "triton.cudagraphs": cuda_graphs,
    }
    return {"options": options, "dynamic": False}


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


def init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: NCCL on GPUs, gloo on CPUs.

    timeout: of a collective, in this group and in all that are made later. DeepSpeed makes groups of its own, and gives them none.
    """
    deepspeed = _import_deepspeed()
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def destroy_process_group() -> None:
    """Leave the process group. By way of DeepSpeed, which would use the old groups in the process's next run otherwise."""
    _import_deepspeed().comm.destroy_process_group()
