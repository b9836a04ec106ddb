#!/usr/bin/env python
"""Train a model: deepspeed launch/train.py --config configs/cat_b.yaml [section.key=value …]"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from launch.cli import Parser, add_local_rank, add_overrides, leave, run
from launch.ranks import adopt_slurm_ranks
from train.guard.signals import stop_signals


def main(arguments: argparse.Namespace) -> None:
    stop_signals.install()  # before anything else: a request to stop must not be lost
    stop_signals.follow_launcher()
    adopt_slurm_ranks()
    train.run(
        arguments.config,
        arguments.overrides,
        output=arguments.output,
        resume=arguments.resume,
        resume_with_changes=arguments.resume_with_changes,
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train a model, under deepspeed, torchrun or plain python. A run that was stopped continues when "
        "it is started again.",
        epilog="exit codes: 0 finished; start again after 69 (a port in use, out of memory), 71 (a rank hung), 74 "
        "(files cannot be read or written), 75 (stopped on request), and after any other code, a crash; correct the "
        "cause first after 65 (bad data), 70 (training failed), 78 (bad configuration)",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, e.g. configs/cat_b.yaml")
    parser.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/<config name>)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="where to start from (default: auto, the newest valid checkpoint in the run's folder)",
    )
    parser.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="resume though settings changed that alter what a step computes",
    )
    add_local_rank(parser)
    add_overrides(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
