"""Run all checks on one rank, one after the other, each with a time limit.

A check runs in a thread of its own. If it exceeds its limit (a file system hangs, a rank is missing from a collective)
it is abandoned, and the process ends with os._exit once the page is written.
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

from data_pipeline.manifest import Manifest
from data_pipeline.storage import open_dataset
from operate.doctor import files, machine, network
from operate.doctor.findings import one_micro_batch
from operate.doctor.meeting import Meeting
from operate.doctor.training_step import measure_step
from operate.task_model import agreed_task, meta_model, task_of
from train import exit_codes
from train.checkpoint.resume_point import Resume
from train.checks import check_start, checked_order
from train.config import Config
from train.engine.deepspeed_config import gradients_here
from train.engine.estimate import checkpoint_bytes
from train.engine.graphs import graphs_wanted
from train.engine.network_interface import choose_interface
from train.engine.runtime import Runtime, start_runtime
from train.exit_codes import exit_code_of
from train.tasks.base import build_task

# Seconds that a check may take: about ten times its time on a healthy cluster.
LIMITS = {
    "machine": 60,
    "disk": 40,
    "dataset": 60,
    "config": 40,
    "decoding": 40,
    "network": 60,
    "links": 90,
    "step": 120,
}
COLLECTIVE = ("network", "links", "step")  # these need all ranks at the same time
TOTAL_LIMIT = 600  # seconds for everything, enforced even if the store no longer answers


def run_checks(config: Config, output: Path, resume: Resume, meeting: Meeting) -> dict[int, dict]:
    """Run all checks; every rank calls this. Returns all ranks' results by rank and check on rank 0, {} elsewhere.

    A result is {"value": …}, {"error": sentence}, {"hung": seconds} or {"skipped": reason}, each with its "seconds".
    A dead rank has none.
    """
    last_resort = threading.Timer(TOTAL_LIMIT, _exit, [meeting.rank])
    last_resort.daemon = True
    last_resort.start()
    checks = Checks(config, output, resume, meeting)
    found: dict[str, dict] = {}
    for name in LIMITS:
        check = getattr(checks, name)
        if name in COLLECTIVE:
            found[name] = _run_together(name, check, meeting)
        elif name == "decoding" and "value" not in found["dataset"]:
            found[name] = {"skipped": "there is no dataset to decode"}
        else:
            found[name] = _run(name, check, meeting, lambda: None)
    facts = meeting.gather(found, sum(LIMITS.values()) / 2)
    if checks.mark:
        _run("disk", lambda: Path(checks.mark).unlink(missing_ok=True), meeting, lambda: None)
    return facts


class Checks:
    """The checks, one method each, in the order of LIMITS; each returns a dictionary that can be written as JSON."""

    def __init__(self, config: Config, output: Path, resume: Resume, meeting: Meeting):
        self.settings, self.output, self.meeting = one_micro_batch(config), output, meeting
        self.resume = resume
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.runtime: Runtime | None = None
        self.manifest: Manifest | None = None
        self.mark = ""

    def machine(self) -> dict:
        return {"devices": machine.devices(self.local_rank), "versions": machine.versions(), "limits": machine.limits()}

    def disk(self) -> dict:
        store = self.meeting.connection()
        if self.meeting.rank == 0:
            self.mark = files.leave_mark(self.output)
            store.set("mark", self.mark)
        store.wait(["mark"], timedelta(seconds=LIMITS["disk"] / 2))
        share = checkpoint_bytes(meta_model(task_of(self.settings)), self.settings) // self.meeting.world
        return files.disk(self.output, share, store.get("mark").decode())

    def dataset(self) -> dict:
        manifest = open_dataset(self.settings.data)
        self.settings.check_dataset(manifest)
        self.manifest = manifest
        return files.dataset(self.settings.data, self.manifest, self.meeting.rank)

    def config(self) -> dict:
        """What training itself checks at its start; without a dataset a part of it, and the result is empty."""
        settings = self.settings
        check_start(settings, self.meeting.rank, self.meeting.world, self.resume)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        graphs_wanted(settings, device, gradients_here(settings, self.meeting.world))
        if self.manifest is None:
            return {}
        steps_per_epoch = checked_order(settings, self.manifest).steps_per_epoch
        return {"steps": settings.total_steps(steps_per_epoch), "warmup": settings.warmup_steps(steps_per_epoch)}

    def decoding(self) -> dict:
        # A single process on a node decodes for all ranks that the run will have there, one per GPU.
        ranks = self.meeting.hosts.count(self.meeting.hosts[self.meeting.rank])
        devices = max(1, torch.cuda.device_count() // ranks)
        data = self.settings.data.model_copy(update={"workers": devices * self.settings.data.workers})
        task = build_task(self.settings, self.manifest.classes)
        return {
            **files.decoding(data, task, self.manifest.split("train"), self.meeting.rank),
            "devices": devices,
        }

    def network(self) -> dict:
        meeting = self.meeting
        choose_interface()
        store = dist.PrefixStore("ranks", meeting.connection())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=meeting.rank, world_size=meeting.world, timeout=timedelta(seconds=TOTAL_LIMIT)
        )
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
        torch.set_num_threads(self.threads)  # the number is per thread
        return measure_step(agreed_task(self.settings, self.manifest, self.runtime.device), self.runtime)


def _exit(rank: int) -> None:
    print(f"error: the doctor is not done after {TOTAL_LIMIT} s on rank {rank}", file=sys.stderr, flush=True)
    os._exit(exit_codes.BAD_CONFIG)


def _run_together(name: str, check: Callable[[], dict], meeting: Meeting) -> dict:
    """Run a check that needs all ranks once all have reached it; stop waiting as soon as one of them gives up."""
    reason = meeting.given_up()
    if reason is None and meeting.absent:
        reason = "not all ranks came"
    reason = reason or meeting.wait_for_all(name, sum(LIMITS.values()) / 2)
    if reason:
        return {"skipped": reason}
    outcome = _run(name, check, meeting, meeting.given_up)
    if "error" in outcome or "hung" in outcome or "failed" in outcome.get("value", {}):
        meeting.give_up(f"{name} on {meeting.hosts[meeting.rank]} failed")
    return outcome


def _run(name: str, check: Callable[[], dict], meeting: Meeting, given_up: Callable[[], str | None]) -> dict:
    """Run a check in a thread until it ends, its limit has passed, or `given_up` returns a reason to stop waiting."""
    outcome: dict = {}

    def body() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the current device is per thread
            outcome["value"] = check()
        except Exception as error:
            if exit_code_of(error) is None:  # errors with an exit code have a message that needs no traceback
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
        if thread.is_alive() and (reason := given_up()):
            return {"skipped": reason, "seconds": time.monotonic() - began}
    return {**outcome, "seconds": round(time.monotonic() - began, 3)}
