"""Assess what the ranks do together: clocks, all-reduce, links between nodes, memory and time of a step.

Each function makes lines of a check's results by rank, of which there is at least one.
"""

import statistics
from collections import Counter

from operate.doctor.findings import GREEN, NAMED, RED, YELLOW, Findings, Line, one_micro_batch
from train.telemetry.formatting import size

# Seconds. Run locks, logs and goodput compare the times of different nodes; NTP keeps them within milliseconds.
CLOCK_SKEW = 1.0
# Time of the gradient's all-reduce, relative to a step's own work: more cannot be hidden, and most devices would wait.
COMMUNICATION_SHARE = 1.0
# A link is slow below the other links' median divided by this: a cable at a tenth of its rate, or three of four lanes
# lost. Healthy links differ by less, noise included, because the best of several transfers counts.
SLOW_LINK = 3.0

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer, EMA and buffers",
    "activations": "activations",
}


def config(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """What a start would refuse is an error of the check, so nothing of that is here."""
    counts = [value for value in values.values() if value]
    if not counts:
        return [Line("config", YELLOW, "train.global_batch and the warm-up were not checked: there is no dataset")]
    warmup, batch = counts[0]["warmup"], findings.config.train.global_batch
    return [Line("config", GREEN, f"{counts[0]['steps']} steps of {batch} samples, {warmup:g} of them of the warm-up")]


def clocks(findings: Findings, values: dict[int, dict]) -> list[Line]:
    moments = [
        statistics.median(stamps) for stamps in zip(*(value["clocks"] for value in values.values()), strict=True)
    ]
    skew = {
        rank: statistics.median(stamp - moment for stamp, moment in zip(value["clocks"], moments, strict=True))
        for rank, value in values.items()
    }
    off = [rank for rank, seconds in skew.items() if abs(seconds) > CLOCK_SKEW]
    if off:
        text = f"{findings.names(off)}: up to {max(map(abs, skew.values())):.1f} s from the others' median"
        remedy = "have NTP set it (chronyc tracking); locks, logs and goodput compare times of nodes"
        return [Line("clocks", RED, text, remedy)]
    return [Line("clocks", GREEN, f"within {1000 * (max(skew.values()) - min(skew.values())):.1f} ms")]


def all_reduce(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """A line if there are several ranks."""
    world = findings.meeting.world
    if world == 1:
        return []
    measured = values[min(values)]["all_reduce"]
    speed = 2 * (world - 1) / world * measured["bytes"] / measured["seconds"]  # bus bandwidth, as nccl-tests define it
    text = f"{size(speed)}/s bus bandwidth, {1e6 * measured['latency']:.0f} us latency, over {world} ranks"
    steps = [value for value in findings.values("step").values() if "compute" in value]
    if not steps:
        return [Line("all-reduce", YELLOW, f"{text}; not judged: no step was measured to compare it with")]
    sizes = one_micro_batch(findings.config).train
    accumulation = max(1, sizes.global_batch // (sizes.micro_batch * world))
    compute = statistics.median(step["compute"] for step in steps) * accumulation
    communication = measured["latency"] + measured["seconds"] * steps[0]["gradient"] / measured["bytes"]
    text += f": {1000 * communication:.1f} ms for the gradient, beside {1000 * compute:.0f} ms of a step's own work"
    if communication > COMMUNICATION_SHARE * compute:
        remedy = (
            "mend a slow link; the right interface (--interface ib0, NCCL_SOCKET_IFNAME); fewer nodes; or a larger "
            "global batch"
        )
        return [Line("all-reduce", RED, text, remedy)]
    return [Line("all-reduce", GREEN, text)]


def links(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """A line if there are several nodes. If most links of a node are slow, it names the node, else the links."""
    rates = {(rank, link["to"]): link["bytes_per_second"] for rank, value in values.items() for link in value["links"]}
    if not rates:
        return []
    slow = {}
    for link, rate in rates.items():
        others = [other for name, other in rates.items() if name != link]
        if others and rate * SLOW_LINK < statistics.median(others):
            slow[link] = statistics.median(others)
    if not slow:
        latency = max(link["latency"] for value in values.values() for link in value["links"])
        median, slowest = size(statistics.median(rates.values())), size(min(rates.values()))
        text = f"{len(rates)} between nodes: median {median}/s, slowest {slowest}/s, {1e6 * latency:.0f} us"
        return [Line("links", GREEN, text)]
    hosts = findings.meeting.hosts
    worst = min(slow, key=rates.get)
    at = f"{size(rates[worst])}/s where the others' median is {size(slow[worst])}/s"
    node, count = Counter(hosts[rank] for pair in slow for rank in pair).most_common(1)[0]
    of_node = sum(node in (hosts[a], hosts[b]) for a, b in rates)
    if len(rates) > 2 and count > of_node / 2:
        text = f"{node} is slow: {count} of its {of_node} links, the slowest {at}"
    else:
        names = [f"{hosts[a]} to {hosts[b]}" for a, b in sorted(slow, key=rates.get)]
        text = f"{', '.join(names[:NAMED])}: {at}"
        node = "NODE"
    remedy = (
        f"cable, port and link rate (ethtool, ibstat); until it is mended leave a node out: --sbatch=--exclude={node}"
    )
    return [Line("links", RED, text, remedy)]


def memory(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """The lines "memory" and, if a step was measured, "step"."""
    first = values[min(values)]
    batch = one_micro_batch(findings.config).train.micro_batch
    parts = ", ".join(f"{size(first['needed'][part])} {text}" for part, text in PARTS.items())
    stage = findings.config.zero.stage
    estimate = f"{size(first['estimated'])} a rank estimated (ZeRO {stage}, micro-batch {batch}: {parts})"
    remedy = (
        "a smaller train.micro_batch, train.activation_checkpointing=true, a higher zero.stage, zero.offload, more "
        "nodes, or --mem"
    )
    short = [rank for rank, value in values.items() if value["estimated"] > value["free"]]
    if short:
        least = size(max(0, min(values[rank]["free"] for rank in short)))
        text = f"{findings.names(short)}: {least} free of memory; {estimate}. The step was not tried"
        return [Line("memory", RED, text, remedy)]
    failed = {rank: value["failed"] for rank, value in values.items() if "failed" in value}
    if failed:
        reason = next(iter(failed.values()))
        text = f"{findings.names(failed)}: the step ran out of memory ({reason}); {estimate}"
        return [Line("memory", RED, text, remedy)]
    measured = [value for value in values.values() if "peak" in value]
    if not measured:
        return [Line("memory", YELLOW, f"{estimate}; the step came to no end")]
    if findings.config.train.micro_batch == "auto":
        text = f"train.micro_batch is auto: tried with {batch}; the run finds the largest that fits. {estimate}"
        line = Line("memory", YELLOW, text)
    else:
        peak, free = max(value["peak"] for value in measured), min(value["free"] for value in values.values())
        text = f"{size(peak)} a rank measured in a real step, {size(free)} free; {estimate}"
        line = Line("memory", GREEN, text)
    return [line, _step(findings, values, measured)]


def _step(findings: Findings, values: dict[int, dict], measured: list[dict]) -> Line:
    skipped = [rank for rank, value in values.items() if value.get("skipped")]
    if skipped:
        text = f"the gradient of a step on noise was not finite on {findings.names(skipped)}"
        remedy = "a broken device computes so (nvidia-smi -q, dmesg for Xid): leave that node out"
        return Line("step", RED, text, remedy)
    step = 1000 * max(value["step"] for value in measured)
    compute = 1000 * statistics.median(value["compute"] for value in measured)
    text = f"{step:.0f} ms with one micro-batch a rank; {compute:.0f} ms for forward and backward alone"
    return Line("step", GREEN, text)
