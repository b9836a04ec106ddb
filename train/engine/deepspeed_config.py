"""The DeepSpeed configuration of a run (DeepSpeed 0.19)."""

import torch
import torch.distributed as dist

from train.config import Config
from train.engine.memory import hosts

# Elements of a communication bucket. DeepSpeed's default of 5e8 would take gigabytes; these are still large enough to
# hide the network's latency.
BUCKET_ELEMENTS = 25_000_000


def zero_stage(config: Config, world: int) -> int:
    """The ZeRO stage that is actually used: 0 instead of 1 and 2 on a single rank, unless the optimizer is offloaded.

    There is nothing to partition on one rank, but stages 1 and 2 would still copy every gradient several times.
    """
    return 0 if world == 1 and config.zero.stage < 3 and not config.zero.offload else config.zero.stage


def gradients_here(config: Config, world: int) -> bool:
    """Whether Engine rather than DeepSpeed differentiates, sums the gradients in fp32, checks that the sum is finite,
    clips it and adapts fp16's loss scale. Only then can a micro-batch be replayed as a CUDA graph.

    Engine does this on the device. DeepSpeed synchronises the host with the device for it, up to four times a step at
    ZeRO 1 and 2. At ZeRO 3 (one synchronisation a step) and with offloading there is no way to replace DeepSpeed's
    checks.
    """
    return zero_stage(config, world) < 3 and not config.zero.offload


def deepspeed_config(config: Config, accumulation: int, device: torch.device) -> dict:
    """The configuration for `deepspeed.initialize`. All ranks call this; the process group must exist.

    accumulation: micro-batches per rank and step.

    If `gradients_here`, the configuration declares fp32 although the weights are bf16 or fp16. DeepSpeed then sums
    gradients in fp32 and does not scale the loss. Declaring bf16 would select BF16_Optimizer at ZeRO 1, which checks
    gradients on the host.
    """
    stage = zero_stage(config, dist.get_world_size())
    ours = gradients_here(config, dist.get_world_size())
    precision = config.train.precision
    zero = {
        "stage": stage,
        # At stages 1 and 2 DeepSpeed overlaps gradient reduction with the backward pass at the price of a
        # synchronisation of the host with the device. Within a machine (NVLink, PCI) that costs more than it hides;
        # between machines it pays off. (Not measured.)
        "overlap_comm": stage == 3 or (len(set(hosts())) > 1 and device.type == "cuda"),
        "contiguous_gradients": True,  # reduce copies of gradients, so that memory does not fragment
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
        "gradient_accumulation_steps": 1 if ours else accumulation,  # Engine sums micro-batches itself
        "gradient_clipping": 0.0 if ours else (config.optimizer.clip_grad or 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU, without compilation at start-up
        # Engine divides the loss by the number of micro-batches of all ranks. Dividing gradients by the number of ranks
        # would round once more to bf16. ZeRO 3 can only average.
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it synchronises twice per micro-batch
    }
    if ours:
        # A loss_scale of 0 would select dynamic scaling for fp16 weights, although fp16 is not enabled.
        return {**settings, "fp16": {"enabled": False, "loss_scale": 1}}
    if precision != "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    # hysteresis 1: every overflow halves the loss scale, as in LossScale, so that all stages skip the same steps.
    fp16 = {"enabled": precision == "fp16", "hysteresis": 1}
    return {**settings, "bf16": {"enabled": precision == "bf16"}, "fp16": fp16}
