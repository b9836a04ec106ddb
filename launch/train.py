#!/usr/bin/env python
"""Train a model: deepspeed launch/train.py --config configs/cat_b.yaml [section.key=value …]"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, leave, run
from launch.ranks import adopt_slurm_ranks
from train.guard.signals import stop_signals


def main(arguments: argparse.Namespace) -> None:
    stop_signals.install()  # first of all: a request to stop must not be lost
    stop_signals.follow_launcher()
    adopt_slurm_ranks()
    # The light half first: a mistake in the config or a missing dataset is answered before torch is imported.
    from data_pipeline.backends import open_backend
    from data_pipeline.order import Order
    from data_pipeline.storage import open_dataset
    from train.checkpoint.init_from import check_source
    from train.config import ConfigError, load_config
    from train.guard.run_lock import RunLock

    config = load_config(arguments.config, arguments.overrides)
    manifest = open_dataset(config.data)
    for split in manifest.splits.values():
        open_backend(config.data.backend, split)  # for its errors: a library or files that are not there
    samples = manifest.split("train").samples
    try:
        sizes = config.train
        order = Order(sizes.seed, samples, sizes.global_batch, config.smallest_micro_batch, config.data.shuffle, config.data.repeats)
        order.share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        raise ConfigError(f"{arguments.config}: {error}") from error
    output = Path(arguments.output or Path("runs") / Path(arguments.config).stem)
    check_source(config, output / "checkpoints", arguments.resume)
    output.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output) if os.environ.get("RANK", "0") == "0" else None
    if lock:
        lock.acquire()
    try:
        from train.trainer import train

        train(config, manifest, order, output, lock, resume=arguments.resume, with_changes=arguments.resume_with_changes)
    finally:
        if lock:
            lock.release()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train a model, under deepspeed, torchrun or plain python. A run that was stopped goes on when started again.",
        epilog="exit codes: 0 finished; start again after 69 (a port in use, out of memory), 71 (a rank hung), 74 (files cannot be read or "
        "written), 75 (stopped on request), and after any other, a crash; mend first after 65 (bad data), 70 (training failed), 78 (bad "
        "configuration)",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, e.g. configs/cat_b.yaml")
    parser.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/<config name>)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|CHECKPOINT",
        help="where to start from (default: auto, the newest valid checkpoint in the run's folder)",
    )
    parser.add_argument("--resume-with-changes", action="store_true", help="resume though settings changed that alter what a step computes")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it; the environment says the same
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's, e.g. train.max_steps=10"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
