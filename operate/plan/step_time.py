"""The time of an optimizer step by ZeRO stage: computation, and what its collectives add.

Bytes by stage: Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion parameter models", section
7. Two things differ: gradients are summed over the ranks in fp32 whatever the precision of the weights, and DeepSpeed
0.19 sums them at stages 1 and 2 by a whole all-reduce (`use_multi_rank_bucket_allreduce`), not by a reduce-scatter.

Time of a collective: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH";
Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". Trees: Sanders, Speck,
Träff 2009, as NCCL uses them.
"""

from dataclasses import dataclass
from math import ceil, log2

from operate.plan.cluster import Cluster
from operate.plan.workload import Workload

STAGES = (0, 1, 2, 3)
BACKWARD = 2 / 3  # of a step's arithmetic


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. sent: bytes that each rank sends."""

    compute: float
    sent: float
    communication: float
    exposed: float  # communication that is not hidden behind computation
    data_wait: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.data_wait


def stream(size: float, cluster: Cluster) -> float:
    """Seconds in which `size` bytes pass once round a ring of all ranks: every rank sends (n - 1) / n of them.

    Each node's network and each GPU's link carry one such stream, so the slower one decides.
    """
    bandwidth = min(cluster.link_within, cluster.link_between) if cluster.nodes > 1 else cluster.link_within
    return (cluster.world - 1) / cluster.world * size / (1e9 * bandwidth)


def latency(cluster: Cluster) -> float:
    """Seconds of the n - 1 successive messages of one pass round the ring."""
    within = cluster.nodes * (cluster.gpus_per_node - 1) * cluster.latency_within
    return 1e-6 * (within + (cluster.nodes * cluster.latency_between if cluster.nodes > 1 else 0.0))


def all_gather(size: float, cluster: Cluster) -> float:
    """Seconds of an all-gather or a reduce-scatter by a ring."""
    return stream(size, cluster) + latency(cluster)


def all_reduce(size: float, cluster: Cluster) -> float:
    """Seconds of an all-reduce: twice round a ring, or by a tree of nodes if its latency is lower."""
    hops = (
        2 * ceil(log2(cluster.nodes)) * cluster.latency_between
        + 2 * (cluster.gpus_per_node - 1) * cluster.latency_within
    )
    return 2 * stream(size, cluster) + min(2 * latency(cluster), 1e-6 * hops)


def step_time(workload: Workload, cluster: Cluster, stage: int) -> StepTime:
    """The step's time at a ZeRO stage.

    Stages 1 and 2 hide the averaging of gradients behind the backward pass, between nodes only (see
    train/engine/deepspeed_config.py); stage 3 hides all communication behind all computation. Hiding is assumed to be
    perfect as far as the time suffices, which is optimistic.
    """
    from train.engine.deepspeed_config import BUCKET_ELEMENTS

    micro_batches, weights = workload.accumulation(cluster.world), float(workload.parameters * workload.element_bytes)
    gradient = 4.0 * workload.parameters
    rate = cluster.images_per_second
    if cluster.cores_per_gpu:
        rate = min(rate, cluster.cores_per_gpu * cluster.decode_rate)
    images = micro_batches * workload.micro_batch
    compute = images / cluster.images_per_second
    alone = cluster.world == 1
    buckets = ceil(workload.parameters / BUCKET_ELEMENTS)
    others = (cluster.world - 1) / cluster.world
    reduce = all_reduce(gradient / buckets, cluster) * buckets
    gather = all_gather(weights / buckets, cluster) * buckets
    scatter = all_gather(gradient / buckets, cluster) * buckets  # a reduce-scatter takes as long
    backward = BACKWARD * compute / micro_batches
    if alone:
        sent = communication = exposed = 0.0
    elif stage == 0:
        sent, communication = 2 * others * gradient, reduce
        exposed = communication
    elif stage < 3:
        times = micro_batches if stage == 2 else 1  # stage 2 reduces every micro-batch's gradient
        sent, communication = others * (2 * times * gradient + weights), times * reduce + gather
        exposed = times * (max(0.0, reduce - backward) if cluster.nodes > 1 else reduce) + gather
    else:
        sent = micro_batches * others * (2 * weights + gradient)
        communication = micro_batches * (2 * gather + scatter)
        exposed = max(0.0, communication - compute)
    # Decoding goes on during the whole step.
    busy = compute + exposed
    waiting = max(images / rate - busy, busy * cluster.data_wait / (100 - cluster.data_wait))
    return StepTime(compute, sent, communication, exposed, waiting)
