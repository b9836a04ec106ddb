"""From what all ranks measured to lines of green, yellow and red. A pure function; every threshold stands here, with its reason."""

import statistics
from collections import Counter

from operate.doctor.case import GREEN, NAMED, RED, YELLOW, Case, Line, odd_one_out, one_micro_batch
from train.telemetry.formatting import counted, size

# A link counts as slow below the others' median divided by this: three lanes of four gone, a cable at a tenth of its rate. Healthy links
# differ by less, noise included, as the best of several transfers counts.
SLOW_LINK = 3.0
# All-reduce of the gradient may take as long as a step's own work: more cannot be hidden behind it, and most devices would wait.
COMMUNICATION_SHARE = 1.0
# Bytes a second of a rank's write, below which something is wrong whatever the size: a tenth of a hard disk.
SLOWEST_DISK = 10e6
# A save may take this part of guard.timeout.save: with all nodes and other jobs busy it will be slower than now.
SAVE_SHARE = 0.5
# Seconds. Run locks, logs and goodput compare the times of different nodes; NTP keeps to milliseconds.
CLOCK_SKEW = 1.0
# Files that a rank has open: 256 of each of two splits, and as much for libraries and logs; and one connection to every other rank.
OPEN_FILES = 768
STORE_CONNECTIONS = 4  # that rank 0 keeps for every rank: see train/guard/rank_store.py
# Bytes of /dev/shm that NCCL may take for each GPU of a node; 64 MB, a container's default, is too little for eight.
SHARED_MEMORY = 64e6
# Decoded images a second relative to what the device takes: with less to spare it waits whenever a file is slow to come.
DECODING_MARGIN = 1.1
# Checkpoints beside those of checkpoint.keep: the best one, and the one that is being written.
CHECKPOINTS_BESIDE = 2


def judge(case: Case) -> list[Line]:
    """One line per thing that was looked at, in the order of the page."""
    lines = [nodes(case)]
    for check, judges in JUDGES.items():
        values, trouble = case.values(check), _trouble(case, check)
        if values or not trouble:
            lines += [line for one in judges for line in _listed(one(case, values)) if values]
        if trouble and not any(line.check == check and line.status == RED for line in lines):
            # What the other nodes found is no news beside that.
            lines = [line for line in lines if line.check != check or trouble.status != RED] + [trouble]
    return lines


def nodes(case: Case) -> Line:
    meeting = case.meeting
    silent = [rank for rank in meeting.present if rank not in case.facts]
    hosts = len({meeting.hosts[rank] for rank in meeting.present})
    said = f"{counted(hosts, 'node')}, {counted(len(meeting.present), 'rank')}"
    if meeting.absent:
        remedy = "look at that node (sinfo -R, ssh), or leave it out: --sbatch=--exclude=NODE; where Python starts slowly, raise --wait"
        return Line("nodes", RED, f"{said} came; {case.names(meeting.absent)} did not", remedy)
    if silent:
        remedy = "see its output: it was killed (out of memory: dmesg), or lost its connection; or leave it out: --sbatch=--exclude=NODE"
        return Line("nodes", RED, f"{said} came; {case.names(silent)} left before the end", remedy)
    return Line("nodes", GREEN, said)


# --- machine -----------------------------------------------------------------------------------------------------------------------------


def devices(case: Case, values: dict[int, dict]) -> Line:
    about = {rank: value["devices"] for rank, value in values.items()}
    texts = {rank: _device(one) for rank, one in about.items()}
    odd = odd_one_out(case, texts)
    if odd:
        remedy = (
            "ask for nodes of one kind (--sbatch=--constraint=…), leave that one out (--sbatch=--exclude=NODE), or give all ranks as many "
        )
        return Line("devices", RED, odd, remedy + "cores (--cpus-per-task, --cpu-bind)")
    return Line("devices", GREEN, f"{len(texts)} x {next(iter(texts.values()))}")


def _device(about: dict) -> str:
    cores = counted(about["cores"], "core")
    if about["kind"] == "cpu":
        return f"{cores} of {about['name']}"
    return f"{about['name']} ({about['bytes'] / 2**30:.0f} GiB), {about['visible']} visible, {cores}"


def versions(case: Case, values: dict[int, dict]) -> Line:
    every = {rank: value["versions"] for rank, value in values.items()}
    names = list(next(iter(every.values())))
    odd = [text for name in names if (text := odd_one_out(case, {rank: f"{name} {one.get(name)}" for rank, one in every.items()}))]
    if odd:
        remedy = "start all nodes from one environment on a shared disk (module load, PYTHONPATH and ~/.local can differ: --setup, --env)"
        return Line("versions", RED, "; ".join(odd), remedy)
    first = next(iter(every.values()))
    shown = [
        f"{name} {first[name]}" for name in ("python", "torch", "deepspeed", "NCCL", "NVIDIA driver") if first.get(name, "none") != "none"
    ]
    commit = first["git"][:10] + ("-dirty" if first["git"].endswith("-dirty") else "")
    return Line("versions", GREEN, f"{', '.join(shown)}, {len(names)} versions, all alike; commit {commit or 'unknown'}")


def limits(case: Case, values: dict[int, dict]) -> list[Line]:
    world = case.meeting.world
    wanted = OPEN_FILES + world
    most = wanted + STORE_CONNECTIONS * world
    # The hard limit: a run raises its own to that.
    few = [rank for rank, value in values.items() if 0 <= value["limits"]["open_files_hard"] < (wanted if rank else most)]
    lowest = min(value["limits"]["open_files_hard"] for value in values.values())
    files = Line("open files", GREEN, f"at least {lowest}" if lowest >= 0 else "no limit")
    if few:
        remedy = f"have the administrator raise the hard limit to {most} (ulimit -Hn; LimitNOFILE of slurmd)"
        files = Line("open files", RED, f"{case.names(few)}: {lowest} allowed, a rank needs {wanted}, and rank 0 {most}", remedy)
    gpus = {rank: value for rank, value in values.items() if value["devices"]["kind"] == "gpu"}
    if not gpus:
        return [files]
    local = Counter(case.meeting.hosts[rank] for rank in gpus)
    small = [
        rank
        for rank, value in gpus.items()
        if local[case.meeting.hosts[rank]] > 1 and (value["limits"]["shm_bytes"] or 0) < SHARED_MEMORY * local[case.meeting.hosts[rank]]
    ]
    least = min(value["limits"]["shm_bytes"] or 0 for value in gpus.values())
    if small:
        remedy = "give the container more: --shm-size=8g (docker), --ipc=host; or clean /dev/shm of what dead jobs have left"
        return [files, Line("shared memory", RED, f"{case.names(small)}: {size(least)} free in /dev/shm; NCCL needs it", remedy)]
    return [files, Line("shared memory", GREEN, f"{size(least)} free")]


# --- files -------------------------------------------------------------------------------------------------------------------------------


def disk(case: Case, values: dict[int, dict]) -> list[Line]:
    first = next(iter(values.values()))
    apart = [rank for rank, value in values.items() if not value["same"]]
    broken = {rank: value["error"] for rank, value in values.items() if "error" in value}
    folder = values.get(0, first)["folder"]
    if apart:
        remedy = "give --output a folder on a disk that all nodes share"
        return [Line("disk", RED, f"{case.names(apart)} does not see the {folder} that rank 0 has", remedy)]
    if broken:
        text = f"{case.names(broken)}: cannot write to {folder}: {next(iter(broken.values()))}"
        return [Line("disk", RED, text, "make room, raise the quota, or give another --output")]
    rates = {rank: value["bytes_per_second"] for rank, value in values.items()}
    seconds = case.checkpoint / len(rates) / min(rates.values())
    limit = SAVE_SHARE * case.config.guard.timeout.save
    slowest = min(rates, key=rates.get)
    slow = [rank for rank, rate in rates.items() if rate < SLOWEST_DISK or case.checkpoint / len(rates) / rate > limit]
    says = f"{size(sum(rates.values()))}/s in {folder}, all ranks at once: a checkpoint of {size(case.checkpoint)} in {seconds:.1f} s"
    lines = [Line("disk", GREEN, says)]
    if slow:
        says = f"{case.names(slow)}: {size(rates[slowest])}/s in {folder}, {seconds:.0f} s for a share of a checkpoint"
        remedy = "another --output (a parallel file system, not a home over NFS); ask who else writes there; or raise guard.timeout.save"
        lines = [Line("disk", RED, says, remedy)]
    count = case.config.checkpoint.keep + CHECKPOINTS_BESIDE
    wanted = max(0, count * case.checkpoint - max(value["held"] for value in values.values()))
    free = min(value["free"] for value in values.values())
    says = f"{size(free)} free; {count} checkpoints (checkpoint.keep, the best, the one in writing) take {size(count * case.checkpoint)}"
    remedy = "make room, give another --output, or lower checkpoint.keep"
    return [*lines, Line("space", GREEN if free >= wanted else RED, says, "" if free >= wanted else remedy)]


def data(case: Case, values: dict[int, dict]) -> Line:
    damaged = {rank: value["damaged"] for rank, value in values.items() if value["damaged"]}
    if damaged:
        says = (
            f"{case.names(damaged)}: {sum(map(len, damaged.values()))} of a sample of images are damaged; {next(iter(damaged.values()))[0]}"
        )
        return Line("dataset", RED, says, f"copy these files again; python launch/prepare.py verify {case.config.data.path} finds all")
    odd = odd_one_out(case, {rank: f"a dataset with fingerprint {value['fingerprint'][:12]}" for rank, value in values.items()})
    if odd:
        return Line("dataset", RED, odd, f"copy one and the same dataset to {case.config.data.path} on all nodes")
    first, checked = next(iter(values.values())), sum(value["checked"] for value in values.values())
    return Line(
        "dataset", GREEN, f"{first['samples']} training samples; all files there, {checked} images read and equal to their checksums"
    )


def decoding(case: Case, values: dict[int, dict]) -> Line:
    wanted, source = case.gpu_rate or (None, "")
    if wanted is None:
        computes = [value["compute"] for value in case.values("step").values() if "compute" in value]
        if not computes:
            slowest = min(value["images_per_second"] for value in values.values())
            return Line(
                "decoding", YELLOW, f"{slowest:.0f} images/s a rank; not judged: no step was measured (--gpu-rate says what is needed)"
            )
        wanted, source = one_micro_batch(case.config).train.micro_batch / statistics.median(computes), "the measured step"
    short = {rank: value for rank, value in values.items() if value["images_per_second"] < DECODING_MARGIN * wanted * value["devices"]}
    slowest = min(values.values(), key=lambda value: value["images_per_second"] / value["devices"])
    rate = slowest["images_per_second"] / slowest["devices"]
    need = f"a device takes {wanted:.0f} ({source})"
    if not short:
        return Line("decoding", GREEN, f"{rate:.0f} images/s for each device; {need}")
    used = min(slowest["threads"], slowest["cores"]) / slowest["devices"]
    cores = -(-DECODING_MARGIN * wanted * used // rate)
    threads = f" and data.workers={cores:.0f}" if slowest["threads"] < cores * slowest["devices"] else ""
    having = f"{counted(slowest['threads'], 'thread')} on {counted(slowest['cores'], 'core')}"
    says = f"{case.names(short)}: {rate:.0f} images/s for each device with {having}; {need}"
    remedy = f"about {cores:.0f} cores a rank (--cpus-per-task={cores:.0f}{threads}), or smaller stored images"
    remedy += " (launch/prepare.py --resize-short)"
    return Line("decoding", RED, says, remedy)


# --- network -----------------------------------------------------------------------------------------------------------------------------


def network(case: Case, values: dict[int, dict]) -> list[Line]:
    lines = [_clock(case, values)]
    world = case.meeting.world
    if world == 1:
        return lines
    one = values[min(values)]["all_reduce"]
    speed = 2 * (world - 1) / world * one["bytes"] / one["seconds"]  # bus bandwidth, as nccl-tests count it
    says = f"{size(speed)}/s bus bandwidth, {1e6 * one['latency']:.0f} us latency, over {world} ranks"
    steps = [value for value in case.values("step").values() if "compute" in value]
    if not steps:
        return [*lines, Line("all-reduce", YELLOW, f"{says}; not judged: no step was measured to compare it with")]
    sizes = one_micro_batch(case.config).train
    compute = statistics.median(step["compute"] for step in steps) * max(1, sizes.global_batch // (sizes.micro_batch * world))
    talk = one["latency"] + one["seconds"] * steps[0]["gradient"] / one["bytes"]
    says += f": {1000 * talk:.1f} ms for the gradient, beside {1000 * compute:.0f} ms of a step's own work"
    if talk > COMMUNICATION_SHARE * compute:
        remedy = "mend a slow link; the right interface (--interface ib0, NCCL_SOCKET_IFNAME); fewer nodes; or a larger global batch"
        return [*lines, Line("all-reduce", RED, says, remedy)]
    return [*lines, Line("all-reduce", GREEN, says)]


def _clock(case: Case, values: dict[int, dict]) -> Line:
    moments = [statistics.median(stamps) for stamps in zip(*(value["clocks"] for value in values.values()), strict=True)]
    skew = {
        rank: statistics.median(stamp - moment for stamp, moment in zip(value["clocks"], moments, strict=True))
        for rank, value in values.items()
    }
    worst = max(skew, key=lambda rank: abs(skew[rank]))
    off = [rank for rank, seconds in skew.items() if abs(seconds) > CLOCK_SKEW]
    if off:
        says = f"{case.names(off)}: up to {abs(skew[worst]):.1f} s from the others' median"
        return Line("clocks", RED, says, "have NTP set it (chronyc tracking); locks, logs and goodput compare times of nodes")
    return Line("clocks", GREEN, f"within {1000 * (max(skew.values()) - min(skew.values())):.1f} ms")


def links(case: Case, values: dict[int, dict]) -> Line | list:
    rates = {(rank, link["to"]): link["bytes_per_second"] for rank, value in values.items() for link in value["links"]}
    if not rates:
        return []
    latency = max(link["latency"] for value in values.values() for link in value["links"])
    slow = {}
    for link, rate in rates.items():
        others = statistics.median(other for name, other in rates.items() if name != link)
        if rate * SLOW_LINK < others:
            slow[link] = others
    median = statistics.median(rates.values())
    if not slow:
        slowest = min(rates.values())
        return Line(
            "links", GREEN, f"{len(rates)} between nodes: median {size(median)}/s, slowest {size(slowest)}/s, {1e6 * latency:.0f} us"
        )
    link = min(slow, key=rates.get)
    at = f"{size(rates[link])}/s where the others' median is {size(slow[link])}/s"
    ends = Counter(case.meeting.hosts[rank] for pair in slow for rank in pair)
    node, count = ends.most_common(1)[0]
    of_node = sum(node in (case.meeting.hosts[a], case.meeting.hosts[b]) for a, b in rates)
    if len(rates) > 2 and count > of_node / 2:
        says = f"{node} is slow: {count} of its {of_node} links, the slowest {at}"
    else:
        names = [f"{case.meeting.hosts[a]} to {case.meeting.hosts[b]}" for a, b in sorted(slow, key=rates.get)]
        says = f"{', '.join(names[:NAMED])}: {at}"
        node = "NODE"
    remedy = f"cable, port and link rate (ethtool, ibstat); until it is mended leave a node out: --sbatch=--exclude={node}"
    return Line("links", RED, says, remedy)


# --- memory ------------------------------------------------------------------------------------------------------------------------------


def memory(case: Case, values: dict[int, dict]) -> list[Line]:
    first = values[min(values)]
    stage = case.config.zero.stage
    needed = first["needed"]
    parts = ", ".join(f"{size(needed[part])} {text}" for part, text in _PARTS.items())
    batch = one_micro_batch(case.config).train.micro_batch
    says = f"{size(first['estimated'])} a rank estimated (ZeRO {stage}, micro-batch {batch}: {parts})"
    remedy = "a smaller train.micro_batch, train.activation_checkpointing=true, a higher zero.stage, zero.offload, more nodes, or --mem"
    short = [rank for rank, value in values.items() if value["estimated"] > value["free"]]
    if short:
        least = min(values[rank]["free"] for rank in short)
        says = f"{case.names(short)}: {size(max(0, least))} free of memory; {says}. The step was not tried"
        return [Line("memory", RED, says, remedy)]
    failed = {rank: value["failed"] for rank, value in values.items() if "failed" in value}
    if failed:
        return [Line("memory", RED, f"{case.names(failed)}: the step ran out of memory ({next(iter(failed.values()))}); {says}", remedy)]
    measured = [value for value in values.values() if "peak" in value]
    if not measured:
        return [Line("memory", YELLOW, f"{says}; the step came to no end")]
    peak, free = max(value["peak"] for value in measured), min(value["free"] for value in values.values())
    lines = [Line("memory", GREEN, f"{size(peak)} a rank measured in a real step, {size(free)} free; {says}")]
    if case.config.train.micro_batch == "auto":
        lines = [Line("memory", YELLOW, f"train.micro_batch is auto: tried with {batch}; the run finds the largest that fits. {says}")]
    step, compute = max(value["step"] for value in measured), statistics.median(value["compute"] for value in measured)
    skipped = [rank for rank, value in values.items() if value.get("skipped")]
    if skipped:
        text = f"the gradient of a step on noise was not finite on {case.names(skipped)}"
        return [*lines, Line("step", RED, text, "a broken device computes so (nvidia-smi -q, dmesg for Xid): leave that node out")]
    return [
        *lines,
        Line("step", GREEN, f"{1000 * step:.0f} ms with one micro-batch a rank; {1000 * compute:.0f} ms for forward and backward alone"),
    ]


_PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer, EMA and buffers", "activations": "activations"}

# By check: what judges it. A check that came to no end on some rank has a red line of its own.
JUDGES = {
    "machine": (devices, versions, limits),
    "disk": (disk,),
    "dataset": (data,),
    "decoding": (decoding,),
    "network": (network,),
    "links": (links,),
    "step": (memory,),
}


def _trouble(case: Case, check: str) -> Line | None:
    """The line of a check that did not come to its end on all ranks."""
    outcomes = {rank: facts.get(check, {"skipped": "the rank left before it"}) for rank, facts in case.facts.items()}
    errors = {rank: one["error"] for rank, one in outcomes.items() if "error" in one}
    hung = {rank: one["hung"] for rank, one in outcomes.items() if "hung" in one}
    skipped = {rank: one["skipped"] for rank, one in outcomes.items() if "skipped" in one}
    if errors:
        text = next(iter(errors.values()))
        return Line(check, RED, f"{case.names(errors)}: {text}", REMEDIES.get(check, "see the traceback in that rank's output"))
    if hung:
        seconds = max(hung.values())
        return Line(check, RED, f"{case.names(hung)}: no end within {seconds:.0f} s", HUNG.get(check, "see that rank's output"))
    if skipped:
        where = f" on {case.names(skipped)}" if len(skipped) < len(case.facts) else ""
        return Line(check, YELLOW, f"not checked{where}: {next(iter(skipped.values()))}")
    return None


REMEDIES = {
    "dataset": "copy the dataset there, or mount it on all nodes under the same path",
    "decoding": "mend the dataset first",
    "network": "the address must be reachable from all nodes: --interface, GLOO_SOCKET_IFNAME, MASTER_ADDR, a firewall between the nodes",
    "links": "see NCCL_DEBUG=INFO; the interface (--interface), a firewall between the nodes",
}
HUNG = {
    "disk": "the file system hangs there: look at its server and at dmesg, or give another --output",
    "dataset": "the file system of the dataset hangs or crawls there: look at its server, or stage the files (data.cache_dir)",
    "decoding": "the file system of the dataset hangs or crawls there: look at its server, or stage the files (data.cache_dir)",
    "network": "a firewall or the wrong interface between the nodes: --interface; NCCL_DEBUG=INFO says what was chosen",
    "links": "a firewall or the wrong interface between the nodes: --interface; NCCL_DEBUG=INFO says what was chosen",
    "step": "see which ranks did not come (py-spy dump; NCCL_DEBUG=INFO); on a CPU, give a smaller model or train.micro_batch",
}


def _listed(lines: Line | list[Line]) -> list[Line]:
    return lines if isinstance(lines, list) else [lines]
