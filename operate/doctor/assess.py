"""Assess what the checks found, as green, yellow and red lines. Pure functions.

The thresholds are constants at the top of assess_node.py and assess_job.py, each with its reason.
"""

from operate.doctor import assess_job, assess_node
from operate.doctor.findings import GREEN, RED, YELLOW, Findings, Line
from train.telemetry.formatting import counted

# By check: the functions that make lines of its results.
ASSESSORS = {
    "machine": (assess_node.devices, assess_node.versions, assess_node.limits),
    "disk": (assess_node.disk,),
    "dataset": (assess_node.dataset,),
    "config": (assess_job.config,),
    "decoding": (assess_node.decoding,),
    "network": (assess_job.clocks, assess_job.all_reduce),
    "links": (assess_job.links,),
    "step": (assess_job.memory,),
}

ERROR_REMEDIES = {
    "dataset": "copy the dataset there, or mount it on all nodes under the same path",
    "config": "correct it: with these settings training ends at its start, with the same sentence",
    "decoding": "mend the dataset first",
    "network": "the address must be reachable from all nodes: --interface, GLOO_SOCKET_IFNAME, MASTER_ADDR, a firewall "
    "between the nodes",
    "links": "see NCCL_DEBUG=INFO; the interface (--interface), a firewall between the nodes",
}
TIMEOUT_REMEDIES = {
    "disk": "the file system hangs there: look at its server and at dmesg, or give another --output",
    **dict.fromkeys(
        ("dataset", "config", "decoding"),
        "the file system of the dataset hangs or crawls there: look at its server, or stage the files (data.cache_dir)",
    ),
    **dict.fromkeys(
        ("network", "links"),
        "a firewall or the wrong interface between the nodes: --interface; NCCL_DEBUG=INFO says what was chosen",
    ),
    "step": "see which ranks did not come (py-spy dump; NCCL_DEBUG=INFO); on a CPU, give a smaller model or "
    "train.micro_batch",
}


def assess(findings: Findings) -> list[Line]:
    """The lines of the page, in its order."""
    lines = [nodes(findings)]
    for check, assessors in ASSESSORS.items():
        values, problem = findings.values(check), _problem(findings, check)
        if values:
            lines += [line for assessor in assessors for line in assessor(findings, values)]
        if problem and not any(line.check == check and line.status == RED for line in lines):
            if problem.status == RED:  # it replaces what the other nodes' results gave
                lines = [line for line in lines if line.check != check]
            lines.append(problem)
    return lines


def nodes(findings: Findings) -> Line:
    """Whether all ranks came and stayed."""
    meeting = findings.meeting
    silent = [rank for rank in meeting.present if rank not in findings.facts]
    hosts = len({meeting.hosts[rank] for rank in meeting.present})
    came = f"{counted(hosts, 'node')}, {counted(len(meeting.present), 'rank')}"
    if meeting.absent:
        remedy = (
            "look at that node (sinfo -R, ssh), or leave it out: --sbatch=--exclude=NODE; where Python starts slowly, "
            "raise --wait"
        )
        return Line("nodes", RED, f"{came} came; {findings.names(meeting.absent)} did not", remedy)
    if silent:
        remedy = (
            "see its output: it was killed (out of memory: dmesg), or lost its connection; or leave it out: "
            "--sbatch=--exclude=NODE"
        )
        return Line("nodes", RED, f"{came} came; {findings.names(silent)} left before the end", remedy)
    return Line("nodes", GREEN, came)


def _problem(findings: Findings, check: str) -> Line | None:
    """The line of a check that some ranks did not complete."""
    outcomes = {
        rank: found.get(check, {"skipped": "the rank left before it"}) for rank, found in findings.facts.items()
    }
    errors = {rank: outcome["error"] for rank, outcome in outcomes.items() if "error" in outcome}
    hung = {rank: outcome["hung"] for rank, outcome in outcomes.items() if "hung" in outcome}
    skipped = {rank: outcome["skipped"] for rank, outcome in outcomes.items() if "skipped" in outcome}
    if errors:
        text = f"{findings.names(errors)}: {next(iter(errors.values()))}"
        return Line(check, RED, text, ERROR_REMEDIES.get(check, "see the traceback in that rank's output"))
    if hung:
        text = f"{findings.names(hung)}: no end within {max(hung.values()):.0f} s"
        return Line(check, RED, text, TIMEOUT_REMEDIES.get(check, "see that rank's output"))
    if skipped:
        where = f" on {findings.names(skipped)}" if len(skipped) < len(findings.facts) else ""
        return Line(check, YELLOW, f"not checked{where}: {next(iter(skipped.values()))}")
    return None
