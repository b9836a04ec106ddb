"""DeepSpeed 0.19's settings for a run."""

import torch
import torch.distributed as dist

from train.config import Config
from train.engine.memory import hosts

# DeepSpeed's default buckets of 5e8 elements would take gigabytes of a laptop's memory; these still hide a network's latency.
BUCKET_ELEMENTS = 25_000_000


def zero_stage(config: Config, world: int) -> int:
    """The ZeRO stage that is run: stages 1 and 2 partition nothing on one rank, and copy every gradient several times for it."""
    return 0 if world == 1 and config.zero.stage < 3 and not config.zero.offload else config.zero.stage


def checked_here(config: Config, world: int) -> bool:
    """Whether Engine, not DeepSpeed, decides on the device if a gradient is finite, clips it and chooses fp16's loss scale.

    Where DeepSpeed does, the host waits for the device: up to four times a step at ZeRO 1 and 2. Only ZeRO 3 (one read a step) and
    offloading have no way round DeepSpeed's own.
    """
    return zero_stage(config, world) < 3 and not config.zero.offload


def deepspeed_config(config: Config, accumulation: int, device: torch.device) -> dict:
    """DeepSpeed's settings. The process group must exist, and every rank must call this.

    Where it is `checked_here`, DeepSpeed is told of fp32 alone, while the weights are bf16 or fp16: then it sums in fp32, at ZeRO 1 too
    (told of bf16 it would choose BF16_Optimizer there, which checks on the host), and leaves the loss scale alone.
    """
    stage = zero_stage(config, dist.get_world_size())
    ours = checked_here(config, dist.get_world_size())
    precision = config.train.precision
    zero = {
        "stage": stage,
        # At stages 1 and 2 DeepSpeed reduces gradients beside the backward pass only if the host may wait for the device after it.
        # That costs more than it hides while the network is NVLink or PCI; from one machine to another it pays. (Not measured.)
        "overlap_comm": stage == 3 or (len(set(hosts())) > 1 and device.type == "cuda"),
        "contiguous_gradients": True,  # reduced in copies: no holes are left between the activations' memory
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
    }
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if ours and stage:
        zero["compute_grad_norm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if ours else (config.optimizer.clip_grad or 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, and compiles nothing at start-up
        # Gradients are of a loss that Engine has divided by the number of micro-batches: a division by the number of ranks would be one
        # more rounding to bf16. ZeRO 3 only averages.
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }
    if ours:
        return {**settings, "fp16": {"enabled": False, "loss_scale": 1}}  # 0 would mean a dynamic one, for fp16 weights
    if precision != "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**settings, "bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16"}}
