"""DeepSpeed, and the only file that knows it.

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
    """Norm of the whole gradient before clipping; `skipped` is 1 where it is not finite, on all ranks alike, and nothing was changed.

    Both are scalars on the device, fp32: to read one on the host is to wait for the whole step.
    """

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its fp32 state as fragments.

    `accumulation` is the number of micro-batches a rank takes per step. Weights are cast to `config.train.precision`; the process
    group must exist.
    """

    def __init__(self, model: nn.Module, config: Config, accumulation: int, device: torch.device):
        deepspeed = _import_deepspeed()
        if config.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError("train.precision=fp16 is not supported by this device; use bf16 or fp32")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.stage, self.offload = zero_stage(config, self.world), config.zero.offload
        self.dtype = DTYPES[config.train.precision]
        self.device, self.clip_grad = device, config.optimizer.clip_grad
        # Where DeepSpeed decides whether a gradient is finite, the host waits for the device: at ZeRO 0 in bf16 once for every parameter,
        # at ZeRO 1 and 2 up to four times a step. There we do it, on the device. Only the loss scale of fp16, ZeRO 3 (one read a step)
        # and offloading have no way round DeepSpeed's own.
        self._checked_here = self.dtype != torch.float16 and self.stage < 3 and not self.offload
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}

        if self.dtype != torch.float32:
            accept_low_precision(model)
        self._base = base = build_optimizer(model.to(device), config.optimizer)
        self._groups = [list(group["params"]) for group in base.param_groups]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=self._settings(config, accumulation))
        self._optimizer = self._engine.optimizer
        self._engine.enable_backward_allreduce = self.stage > 0 or self.world > 1  # alone, there is nobody to average with
        self._copies: tuple[list[Tensor], list[Tensor]] | None = None  # fp32 masters that are ours, and the weights they are the masters of
        if self.stage == 0:
            self._masters = self._own_masters() if self._checked_here else self._optimizer.fp32_groups
        self._compiled_for = config.train.micro_batch if config.train.compile else 0  # images: another number would be compiled again
        if config.train.compile:
            self._compile(config.train.cuda_graphs, accumulation)
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
        count = len(images)
        if count < self._compiled_for:  # the last ones of an evaluation
            images = nn.functional.pad(images, (0,) * 7 + (self._compiled_for - count,))
        return self._engine(images.to(self.dtype))[:count]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss; the last of a step also averages it over ranks.

        A loss that is not finite makes the gradient so, and with it the norm that all ranks see: no message and no waiting is needed.
        """
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

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
            norm = torch.nan if skipped else self._engine.get_global_grad_norm()
            return StepResult(torch.as_tensor(norm).float(), torch.full((), float(skipped), device=next(iter(self._moments)).device))
        norm = self._gradient_norm()
        skipped = norm.isfinite().logical_not().float()
        # torch's fused optimizers divide by the one, and do nothing at all where the other is 1: what torch.amp's scaler uses.
        self._base.found_inf = skipped
        if self.clip_grad:
            self._base.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1)
        if self._copies:
            masters, weights = self._copies
            gradients = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(gradients, [weight.grad for weight in weights])
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
        self._engine.step()
        if self._copies:
            torch._foreach_copy_(weights, masters)
            self._base.zero_grad()
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
            # At stages 1 and 2 DeepSpeed reduces gradients beside the backward pass only if the host may wait for the device after it.
            # That costs more than it hides while the network is NVLink or PCI; from one machine to another it pays. (Not measured.)
            "overlap_comm": self.stage == 3 or (self.device.type == "cuda" and self.world > torch.cuda.device_count()),
            "contiguous_gradients": True,  # reduced in copies: no holes are left between the activations' memory
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        }
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self._checked_here else (self.clip_grad or 0.0),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, and compiles nothing at start-up
        }
        if self._checked_here and self.stage:
            zero["compute_grad_norm"] = False
        if self._checked_here and self.stage == 0:  # see _own_masters
            return {**settings, "communication_data_type": "bf16" if self.dtype == torch.bfloat16 else "fp32"}
        bf16 = {"enabled": self.dtype == torch.bfloat16, "check_grad_overflow": not self._checked_here}
        return {**settings, "bf16": bf16, "fp16": {"enabled": self.dtype == torch.float16}}

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

    def _own_masters(self) -> list[list[Tensor]]:
        """ZeRO 0, where DeepSpeed was told of fp32 alone: in bf16, casts the weights and gives the optimizer fp32 masters of them."""
        if self.dtype == torch.float32:
            return self._groups
        for parameter in self.names:
            parameter.data = parameter.data.to(self.dtype)
        for group in self._base.param_groups:
            group["params"] = [nn.Parameter(parameter.detach().float()) for parameter in group["params"]]
        masters = [group["params"] for group in self._base.param_groups]
        self._copies = sum(masters, []), sum(self._groups, [])
        return masters

    def _gradient_norm(self) -> Tensor:
        """Of all gradients, averaged over the ranks as they are after `backward`."""
        if self.stage:  # each rank has those of its share
            gradients = [gradient for group in self._optimizer.averaged_gradients.values() for gradient in group]
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

    def _scaler(self) -> object:
        return self._optimizer.loss_scaler if self.stage else self._optimizer.loss_scale_config


def zero_stage(config: Config, world: int) -> int:
    """The ZeRO stage that is run: stages 1 and 2 partition nothing on one rank, and copy every gradient several times for it."""
    return 0 if world == 1 and config.zero.stage < 3 and not config.zero.offload else config.zero.stage


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
