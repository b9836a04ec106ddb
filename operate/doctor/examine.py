"""All of the doctor's checks on one rank, one after the other, and none without an end.

A check runs in a thread of its own. Where it takes too long (a file system that hangs, a rank that does not come to a collective) it is
left behind, and the process ends with os._exit once the page is written.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.storage import open_dataset
from operate.doctor import files, machine, network, step
from operate.doctor.case import one_micro_batch
from operate.doctor.meeting import Meeting
from train.config import Config
from train.engine.estimate import checkpoint_bytes
from train.engine.network_interface import choose_interface
from train.engine.runtime import Runtime, start_runtime

# Seconds that a check may take: some ten times what it takes on a healthy cluster.
LIMITS = {"machine": 60, "disk": 40, "dataset": 60, "decoding": 40, "network": 60, "links": 90, "step": 120}
COLLECTIVE = ("network", "links", "step")  # what needs all ranks at the same time
CLASSES = 1000  # where no node has the dataset
ALL = 600  # seconds, of everything: the last resort, where the store itself does not answer any more


def examine(config: Config, output: Path, meeting: Meeting) -> dict[int, dict]:
    """Run all checks; every rank calls this. On rank 0: what all ranks found, by rank and check; elsewhere nothing.

    A finding is {"value": …}, {"error": sentence}, {"hung": seconds} or {"skipped": why}, and its "seconds". Ranks that are dead have none.
    """
    last_resort = threading.Timer(ALL, _leave, [meeting.rank])
    last_resort.daemon = True
    last_resort.start()
    patient = Patient(config, output, meeting)
    found: dict[str, dict] = {}
    for name in LIMITS:
        check = getattr(patient, name)
        if name in COLLECTIVE:
            found[name] = _together(name, check, meeting)
        elif name == "decoding" and "value" not in found["dataset"]:
            found[name] = {"skipped": "there is no dataset to decode"}
        else:
            found[name] = _run(name, check, meeting, lambda: None)
    facts = meeting.gather(found, sum(LIMITS.values()) / 2)
    if patient.mark:
        _run("disk", lambda: Path(patient.mark).unlink(missing_ok=True), meeting, lambda: None)
    return facts


class Patient:
    """The checks, by name; each returns what can be written as JSON."""

    def __init__(self, config: Config, output: Path, meeting: Meeting):
        self.config, self.output, self.meeting = one_micro_batch(config), output, meeting
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.runtime: Runtime | None = None
        self.mark = ""
        self.classes = 0

    def machine(self) -> dict:
        return {"devices": machine.devices(self.local_rank), "versions": machine.versions(), "limits": machine.limits()}

    def disk(self) -> dict:
        store = self.meeting.connection()
        if self.meeting.rank == 0:
            self.mark = files.leave_mark(self.output)
            store.set("mark", self.mark)
        store.wait(["mark"], timedelta(seconds=LIMITS["disk"] / 2))
        share = checkpoint_bytes(self.config, CLASSES) // self.meeting.world
        return files.disk(self.output, share, store.get("mark").decode())

    def dataset(self) -> dict:
        self.manifest = open_dataset(self.config.data)
        self.classes = len(self.manifest.classes)
        return files.dataset(self.config.data, self.manifest, self.meeting.rank)

    def decoding(self) -> dict:
        # With one process a node, it stands for all ranks that the run will have there: one for each GPU.
        ranks = self.meeting.hosts.count(self.meeting.hosts[self.meeting.rank])
        devices = max(1, torch.cuda.device_count() // ranks)
        data = self.config.data.model_copy(update={"workers": devices * self.config.data.workers})
        return {**files.decoding(data, self.config.augment, self.manifest.split("train"), self.meeting.rank), "devices": devices}

    def network(self) -> dict:
        meeting = self.meeting
        choose_interface()
        store = dist.PrefixStore("ranks", meeting.connection())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.world, timeout=timedelta(seconds=ALL))
        self.runtime = start_runtime()
        self.threads = torch.get_num_threads()
        network.gloo(LIMITS["network"] / 2)
        clocks = network.clocks()
        return {"clocks": clocks, "all_reduce": network.all_reduce(self.runtime.device) if meeting.world > 1 else None}

    def links(self) -> dict:
        leaders = self.meeting.leaders
        if self.meeting.rank not in leaders:
            return {"links": []}
        return {"links": network.pairs(leaders, self.meeting.rank, self.runtime.device)}

    def step(self) -> dict:
        torch.set_num_threads(self.threads)  # a thread has its own number
        classes = torch.tensor(self.classes, device=self.runtime.device)  # where a node has no dataset, the others know
        dist.all_reduce(classes, op=dist.ReduceOp.MAX)
        return step.take(self.config, int(classes) or CLASSES, self.runtime)


def _leave(rank: int) -> None:
    print(f"error: the doctor is not done after {ALL} s on rank {rank}", file=sys.stderr, flush=True)
    os._exit(78)


def _together(name: str, check: Callable[[], dict], meeting: Meeting) -> dict:
    """A check that needs all ranks: once all have come to it; and no longer than the first of them gives up."""
    why = meeting.given_up()
    if why is None and meeting.absent:
        why = "not all ranks came"
    why = why or meeting.wait_for_all(name, sum(LIMITS.values()) / 2)
    if why:
        return {"skipped": why}
    outcome = _run(name, check, meeting, meeting.given_up)
    if "error" in outcome or "hung" in outcome or "failed" in outcome.get("value", {}):
        meeting.give_up(f"{name} on {meeting.hosts[meeting.rank]} failed")
    return outcome


def _run(name: str, check: Callable[[], dict], meeting: Meeting, given_up: Callable[[], str | None]) -> dict:
    """The outcome of a check: no later than its limit, or than when `given_up` says why nobody waits any longer."""
    outcome: dict = {}

    def body() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a thread has its own
            outcome["value"] = check()
        except Exception as error:
            if not hasattr(error, "exit_code"):  # not an error that says itself what to do
                traceback.print_exc()
            outcome["error"] = str(error).splitlines()[0] if str(error) else type(error).__name__

    thread = threading.Thread(target=body, name=name, daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        meeting.beat()
        if time.monotonic() - began > LIMITS[name]:
            return {"hung": LIMITS[name], "seconds": LIMITS[name]}
        if thread.is_alive() and (why := given_up()):
            return {"skipped": why, "seconds": time.monotonic() - began}
    return {**outcome, "seconds": round(time.monotonic() - began, 3)}
