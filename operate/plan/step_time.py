"""The time of an optimizer step by ZeRO stage: computation, and what its collectives add.

Bytes by stage: Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion parameter models", section
7. One thing differs: gradients are summed over the ranks in fp32 whatever the precision of the weights.

Time of a collective: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH";
Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". Trees: Sanders, Speck,
Träff 2009, as NCCL uses them.
"""

from dataclasses import dataclass
from math import ceil, log2

from operate.plan.cluster import Cluster
from operate.plan.workload import Workload

STAGES = (0, 1, 2, 3)


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

    Stages 0 to 2 sum the gradients in one piece after the backward pass (train/engine/gradients.py), and hide nothing.
    Stage 3 hides all communication behind all computation, which is assumed to be perfect as far as the time suffices;
    that is optimistic.
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
    gather = all_gather(weights / buckets, cluster) * buckets
    if alone:
        sent = communication = exposed = 0.0
    elif stage == 0:
        sent, communication = 2 * others * gradient, all_reduce(gradient, cluster)
        exposed = communication
    elif stage < 3:
        times = micro_batches if stage == 2 else 1  # stage 2 reduces every micro-batch's gradient
        sent = others * (times * gradient + weights)
        # A reduce-scatter takes as long as an all-gather.
        communication = exposed = times * all_gather(gradient, cluster) + gather
    else:
        sent = micro_batches * others * (2 * weights + gradient)
        communication = micro_batches * (2 * gather + all_gather(gradient / buckets, cluster) * buckets)
        exposed = max(0.0, communication - compute)
    # Decoding goes on during the whole step.
    busy = compute + exposed
    waiting = max(images / rate - busy, busy * cluster.data_wait / (100 - cluster.data_wait))
    return StepTime(compute, sent, communication, exposed, waiting)
