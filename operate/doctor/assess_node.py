"""Assess what each node has: devices, versions, limits, disk, dataset, decoding speed.

Each function makes lines of a check's results by rank, of which there is at least one.
"""

import statistics
from collections import Counter

from operate.doctor.findings import GREEN, RED, YELLOW, Findings, Line, one_micro_batch
from train.telemetry.formatting import counted, size

# Files that a rank needs: some hundred for its data, of which it keeps open as many as its limit allows, and for
# libraries and logs. Connections are added.
OPEN_FILES = 768
STORE_CONNECTIONS = 4  # that rank 0 keeps for every rank: see train/guard/rank_store.py
# Bytes of /dev/shm that NCCL may need for each GPU of a node; a container's default of 64 MB is too little for eight.
SHARED_MEMORY = 64e6
# Bytes per second of a rank's writing, below which something is wrong with any checkpoint: a tenth of a hard disk.
SLOWEST_DISK = 10e6
# Share of guard.timeout.save that a save may take: it will be slower when all nodes and other jobs are busy.
SAVE_SHARE = 0.5
# Checkpoints on the disk beyond checkpoint.keep: the best one, and the one that is being written.
CHECKPOINTS_BESIDE = 2
# Decoded images per second, relative to what the device takes: with less to spare it waits for every slow file.
DECODING_MARGIN = 1.1


def devices(findings: Findings, values: dict[int, dict]) -> list[Line]:
    texts = {rank: _device(value["devices"]) for rank, value in values.items()}
    if odd := findings.differences(texts):
        remedy = (
            "ask for nodes of one kind (--sbatch=--constraint=…), leave that one out (--sbatch=--exclude=NODE), or "
            "give all ranks as many cores (--cpus-per-task, --cpu-bind)"
        )
        return [Line("devices", RED, odd, remedy)]
    return [Line("devices", GREEN, f"{len(texts)} x {next(iter(texts.values()))}")]


def _device(about: dict) -> str:
    cores = counted(about["cores"], "core")
    if about["kind"] == "cpu":
        return f"{cores} of {about['name']}"
    return f"{about['name']} ({about['bytes'] / 2**30:.0f} GiB), {about['visible']} visible, {cores}"


def versions(findings: Findings, values: dict[int, dict]) -> list[Line]:
    by_rank = {rank: value["versions"] for rank, value in values.items()}
    first = next(iter(by_rank.values()))
    texts = ({rank: f"{name} {found.get(name)}" for rank, found in by_rank.items()} for name in first)
    if odd := list(filter(None, map(findings.differences, texts))):
        remedy = (
            "start all nodes from one environment on a shared disk (module load, PYTHONPATH and ~/.local can differ: "
            "--setup, --env)"
        )
        return [Line("versions", RED, "; ".join(odd), remedy)]
    names = ("python", "torch", "deepspeed", "NCCL", "NVIDIA driver")
    shown = ", ".join(f"{name} {first[name]}" for name in names if first.get(name, "none") != "none")
    commit = first["git"][:10] + ("-dirty" if first["git"].endswith("-dirty") else "")
    return [Line("versions", GREEN, f"{shown}, {len(first)} versions, all alike; commit {commit or 'unknown'}")]


def limits(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """The lines "open files" and, on GPUs, "shared memory"."""
    lines = [_open_files(findings, values)]
    gpus = {rank: value for rank, value in values.items() if value["devices"]["kind"] == "gpu"}
    return [*lines, _shared_memory(findings, gpus)] if gpus else lines


def _open_files(findings: Findings, values: dict[int, dict]) -> Line:
    world = findings.meeting.world
    wanted = OPEN_FILES + world
    most = wanted + STORE_CONNECTIONS * world
    # The hard limit counts: a run raises its soft limit to that. -1 is no limit.
    hard = {rank: value["limits"]["open_files_hard"] for rank, value in values.items()}
    few = [rank for rank, limit in hard.items() if 0 <= limit < (wanted if rank else most)]
    lowest = min(hard.values())
    if few:
        text = f"{findings.names(few)}: {lowest} allowed, a rank needs {wanted}, and rank 0 {most}"
        remedy = f"have the administrator raise the hard limit to {most} (ulimit -Hn; LimitNOFILE of slurmd)"
        return Line("open files", RED, text, remedy)
    return Line("open files", GREEN, f"at least {lowest}" if lowest >= 0 else "no limit")


def _shared_memory(findings: Findings, gpus: dict[int, dict]) -> Line:
    hosts = findings.meeting.hosts
    local = Counter(hosts[rank] for rank in gpus)
    free = {rank: value["limits"]["shm_bytes"] or 0 for rank, value in gpus.items()}
    small = [rank for rank in gpus if local[hosts[rank]] > 1 and free[rank] < SHARED_MEMORY * local[hosts[rank]]]
    least = size(min(free.values()))
    if small:
        text = f"{findings.names(small)}: {least} free in /dev/shm; NCCL needs it"
        remedy = (
            "give the container more: --shm-size=8g (docker), --ipc=host; or clean /dev/shm of what dead jobs have left"
        )
        return Line("shared memory", RED, text, remedy)
    return Line("shared memory", GREEN, f"{least} free")


def disk(findings: Findings, values: dict[int, dict]) -> list[Line]:
    """The lines "disk" and "space"."""
    apart = [rank for rank, value in values.items() if not value["same"]]
    broken = {rank: value["error"] for rank, value in values.items() if "error" in value}
    folder = values.get(0, next(iter(values.values())))["folder"]
    if apart:
        remedy = "give --output a folder on a disk that all nodes share"
        return [Line("disk", RED, f"{findings.names(apart)} does not see the {folder} that rank 0 has", remedy)]
    if broken:
        text = f"{findings.names(broken)}: cannot write to {folder}: {next(iter(broken.values()))}"
        return [Line("disk", RED, text, "make room, raise the quota, or give another --output")]
    return [_writing(findings, values, folder), _space(findings, values)]


def _writing(findings: Findings, values: dict[int, dict], folder: str) -> Line:
    rates = {rank: value["bytes_per_second"] for rank, value in values.items()}
    share = findings.checkpoint / len(rates)
    limit = SAVE_SHARE * findings.config.guard.timeout.save
    slowest = min(rates.values())
    slow = [rank for rank, rate in rates.items() if rate < SLOWEST_DISK or share / rate > limit]
    if slow:
        text = f"{size(slowest)}/s in {folder}, {share / slowest:.0f} s for a share of a checkpoint"
        remedy = (
            "another --output (a parallel file system, not a home over NFS); ask who else writes there; or raise "
            "guard.timeout.save"
        )
        return Line("disk", RED, f"{findings.names(slow)}: {text}", remedy)
    text = f"{size(sum(rates.values()))}/s in {folder}, all ranks at once"
    return Line("disk", GREEN, f"{text}: a checkpoint of {size(findings.checkpoint)} in {share / slowest:.1f} s")


def _space(findings: Findings, values: dict[int, dict]) -> Line:
    count = findings.config.checkpoint.keep + CHECKPOINTS_BESIDE
    total = count * findings.checkpoint
    missing = max(0, total - max(value["held"] for value in values.values()))
    free = min(value["free"] for value in values.values())
    text = f"{size(free)} free; {count} checkpoints (checkpoint.keep, the best, the one in writing) take {size(total)}"
    if free < missing:
        return Line("space", RED, text, "make room, give another --output, or lower checkpoint.keep")
    return Line("space", GREEN, text)


def dataset(findings: Findings, values: dict[int, dict]) -> list[Line]:
    path = findings.config.data.path
    damaged = {rank: value["damaged"] for rank, value in values.items() if value["damaged"]}
    if damaged:
        count, example = sum(map(len, damaged.values())), next(iter(damaged.values()))[0]
        text = f"{findings.names(damaged)}: {count} of a sample of images are damaged; {example}"
        remedy = f"copy these files again; python launch/prepare.py verify {path} finds all"
        return [Line("dataset", RED, text, remedy)]
    fingerprints = {rank: f"a dataset with fingerprint {value['fingerprint'][:12]}" for rank, value in values.items()}
    if odd := findings.differences(fingerprints):
        return [Line("dataset", RED, odd, f"copy one and the same dataset to {path} on all nodes")]
    samples, checked = next(iter(values.values()))["samples"], sum(value["checked"] for value in values.values())
    text = f"{samples} training samples; all files there, {checked} images read and equal to their checksums"
    return [Line("dataset", GREEN, text)]


def decoding(findings: Findings, values: dict[int, dict]) -> list[Line]:
    wanted, source = findings.gpu_rate or (None, "")
    if wanted is None:
        computes = [value["compute"] for value in findings.values("step").values() if "compute" in value]
        if not computes:
            slowest = min(value["images_per_second"] for value in values.values())
            text = f"{slowest:.0f} images/s a rank; not judged: no step was measured (--gpu-rate says what is needed)"
            return [Line("decoding", YELLOW, text)]
        wanted = one_micro_batch(findings.config).train.micro_batch / statistics.median(computes)
        source = "the measured step"
    rates = {rank: value["images_per_second"] / value["devices"] for rank, value in values.items()}
    short = [
        rank
        for rank, value in values.items()
        if value["images_per_second"] < DECODING_MARGIN * wanted * value["devices"]
    ]
    slowest = values[min(rates, key=rates.get)]
    rate = min(rates.values())
    need = f"a device takes {wanted:.0f} ({source})"
    if not short:
        return [Line("decoding", GREEN, f"{rate:.0f} images/s for each device; {need}")]
    used = min(slowest["threads"], slowest["cores"]) / slowest["devices"]
    cores = -(-DECODING_MARGIN * wanted * used // rate)
    threads = f" and data.workers={cores:.0f}" if slowest["threads"] < cores * slowest["devices"] else ""
    having = f"{counted(slowest['threads'], 'thread')} on {counted(slowest['cores'], 'core')}"
    text = f"{findings.names(short)}: {rate:.0f} images/s for each device with {having}; {need}"
    remedy = (
        f"about {cores:.0f} cores a rank (--cpus-per-task={cores:.0f}{threads}), or smaller stored images "
        "(launch/prepare.py --resize-short)"
    )
    return [Line("decoding", RED, text, remedy)]
