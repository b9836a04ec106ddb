"""A step's time, by ZeRO stage: computing, and what its collectives add.

Bytes by stage: Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion parameter models", section 7, but that
gradients are summed over the ranks in fp32 whatever the weights are in, and that DeepSpeed 0.19 does so at stages 1 and 2 by a whole
all-reduce (`use_multi_rank_bucket_allreduce`), where a reduce-scatter would do.
Time of a collective: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH"; Patarasuk and Yuan
2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". Trees: Sanders, Speck, Träff 2009, as NCCL uses them.
"""

from dataclasses import dataclass
from math import ceil, log2

from operate.plan.cluster import Cluster
from operate.plan.job import Job

STAGES = (0, 1, 2, 3)
BACKWARD = 2 / 3  # of a step's arithmetic


@dataclass(frozen=True)
class Step:
    """Of one optimizer step: seconds; `sent`: bytes that each rank sends."""

    compute: float
    sent: float
    communication: float
    exposed: float  # of the communication, what is not hidden behind the arithmetic
    data_wait: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.data_wait


def stream(size: float, cluster: Cluster) -> float:
    """Seconds in which `size` bytes pass once round a ring of all ranks: every rank sends (n - 1) / n of them.

    A node's network carries one such stream, and a GPU's link as well, so the slower one decides.
    """
    bandwidth = min(cluster.link_within, cluster.link_between) if cluster.nodes > 1 else cluster.link_within
    return (cluster.world - 1) / cluster.world * size / (1e9 * bandwidth)


def latency(cluster: Cluster) -> float:
    """Seconds of the n - 1 messages, one after the other, of one time round the ring."""
    within = cluster.nodes * (cluster.gpus_per_node - 1) * cluster.latency_within
    return 1e-6 * (within + (cluster.nodes * cluster.latency_between if cluster.nodes > 1 else 0.0))


def all_gather(size: float, cluster: Cluster) -> float:
    """Seconds, by a ring; a reduce-scatter's as well."""
    return stream(size, cluster) + latency(cluster)


def all_reduce(size: float, cluster: Cluster) -> float:
    """Seconds: twice round a ring; or, where messages take longer than bytes, up and down a tree of nodes at the same bandwidth."""
    hops = 2 * ceil(log2(cluster.nodes)) * cluster.latency_between + 2 * (cluster.gpus_per_node - 1) * cluster.latency_within
    return 2 * stream(size, cluster) + min(2 * latency(cluster), 1e-6 * hops)


def step(job: Job, cluster: Cluster, stage: int) -> Step:
    """What hides: the gradients' averaging behind the backward pass, at stages 1 and 2 between nodes only (see
    train/engine/deepspeed_config.py), and at stage 3
    everything behind everything. Perfectly so, as far as the time suffices: a guess on the hopeful side."""
    from train.engine.deepspeed_config import BUCKET_ELEMENTS

    micro_batches, weights = job.accumulation(cluster.world), float(job.parameters * job.element_bytes)
    gradient = 4.0 * job.parameters
    rate = cluster.images_per_second
    if cluster.cores_per_gpu:
        rate = min(rate, cluster.cores_per_gpu * cluster.decode_rate)
    images = micro_batches * job.micro_batch
    compute = images / cluster.images_per_second
    alone = cluster.world == 1
    buckets = ceil(job.parameters / BUCKET_ELEMENTS)
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
        times = micro_batches if stage == 2 else 1  # stage 2 keeps no whole gradient from one micro-batch to the next
        sent, communication = others * (2 * times * gradient + weights), times * reduce + gather
        exposed = times * (max(0.0, reduce - backward) if cluster.nodes > 1 else reduce) + gather
    else:
        sent = micro_batches * others * (2 * weights + gradient)
        communication = micro_batches * (2 * gather + scatter)
        exposed = max(0.0, communication - compute)
    # Decoding goes on during all of a step.
    busy = compute + exposed
    waiting = max(images / rate - busy, busy * cluster.data_wait / (100 - cluster.data_wait))
    return Step(compute, sent, communication, exposed, waiting)
