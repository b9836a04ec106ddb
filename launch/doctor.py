#!/usr/bin/env python
"""Is this allocation fit for this run?

srun python launch/doctor.py --config configs/cat_b.yaml [section.key=value …]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.cli import Parser, add_local_rank, add_overrides, leave, number, run
from launch.ranks import adopt_slurm_ranks, tasks_per_node
from train import exit_codes

if TYPE_CHECKING:
    from train.config import Config


class NotFit(Exception):
    """A line of the page is red."""

    exit_code = exit_codes.BAD_CONFIG


def main(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    adopt_slurm_ranks()
    from train.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    output = Path(arguments.output or Path("runs") / Path(arguments.config).stem)
    from torch.distributed import DistError

    from operate.doctor.assess import assess
    from operate.doctor.checks import run_checks
    from operate.doctor.findings import RED, Findings
    from operate.doctor.meeting import MeetingFailed, meet
    from operate.doctor.page import document, page, verdict
    from operate.task_model import meta_model, task_of
    from train.checkpoint.resume_point import Resume
    from train.engine.estimate import checkpoint_bytes

    try:
        meeting = meet(arguments.wait, expected_hosts())
    except MeetingFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    try:
        resume = Resume.decide(output, arguments.resume, arguments.resume_with_changes)
        facts = run_checks(config, output, resume, meeting)
    except DistError as error:
        print(f"error: rank {meeting.rank} has lost rank 0, which is dead: see its output", file=sys.stderr, flush=True)
        raise NotFit("rank 0 has gone") from error
    if meeting.rank:
        return
    rate = (arguments.gpu_rate, "--gpu-rate") if arguments.gpu_rate else measured_rate(config)
    checkpoint = checkpoint_bytes(meta_model(task_of(config)), config)
    lines = assess(Findings(config, meeting, facts, checkpoint, rate))
    seconds = time.monotonic() - began
    about = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "output": str(output),
        "world": meeting.world,
    }
    title = f"{arguments.config} on {', '.join(dict.fromkeys(meeting.hosts))}"
    print(page(lines, title, seconds, colour=sys.stdout.isatty()), flush=True)
    text = document(lines, about, seconds, facts, list(meeting.hosts))
    for path in filter(None, (arguments.json, arguments.output and output / "doctor.json")):
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:  # a full disk has a red line already
            print(f"{path} was not written: {error.strerror}", file=sys.stderr)
    if verdict(lines) == RED:
        raise NotFit(f"not fit for this run: {', '.join(line.check for line in lines if line.status == RED)}")


def expected_hosts() -> list[str]:
    """The host of every rank, as SLURM places them in blocks; empty outside of a SLURM step."""
    if "SLURM_STEP_NODELIST" not in os.environ:
        return []
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    names = subprocess.run(command, capture_output=True, text=True).stdout.split()
    counts = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    return [name for name, tasks in zip(names, counts, strict=False) for _ in range(tasks)]


def measured_rate(config: "Config") -> tuple[float, str] | None:
    """Images per second of one GPU in training and their source, if `make gpu` has measured this classifier at this
    size.
    """
    import torch

    path = ROOT / "docs" / "results" / "gpu-model.json"
    measured = config.task.name == "classification" and config.data.image_size == 224
    if not torch.cuda.is_available() or not measured or not path.exists():
        return None
    rows = [row for row in json.loads(path.read_text())["rows"] if row.get("model") == config.model.name]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return (max(rates), f"measured: {path.relative_to(ROOT)}") if rates else None


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Look at the nodes of an allocation before a long job: versions, network, disks, dataset, cores, "
        "memory. Run it as the training would be run (srun, deepspeed, torchrun), or with one process a node, or "
        "alone. docs/doctor.md explains every line.",
        epilog="exit codes: 0 fit (yellow lines are what could not be checked), 78 not fit, or bad arguments",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's recipe, e.g. configs/cat_b.yaml")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the run's folder (default: runs/<config name>); where given, it gets doctor.json",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument(
        "--gpu-rate",
        type=number(float, 0.001),
        metavar="N",
        help="images/s that a device takes (default: what make gpu or the step here measured)",
    )
    parser.add_argument(
        "--wait",
        type=number(float, 0.001),
        default=120,
        metavar="SECONDS",
        help="for nodes that start slowly (default: 120)",
    )
    parser.add_argument(
        "--resume", default="auto", help=argparse.SUPPRESS
    )  # the arguments of launch/train.py can be given as they are
    parser.add_argument("--resume-with-changes", action="store_true", help=argparse.SUPPRESS)
    add_local_rank(parser)
    add_overrides(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))  # a check that hangs, and the threads of the network, would keep this process
