#!/usr/bin/env python
"""Evaluate a run's newest checkpoint, or one checkpoint, on a dataset's `val` split: python launch/evaluate.py runs/cifar10"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, leave, run
from launch.ranks import adopt_slurm_ranks


def main(arguments: argparse.Namespace) -> None:
    adopt_slurm_ranks()
    from data_pipeline.storage import open_dataset
    from train.config import ConfigError
    from train.trained import check_target, read_trained

    target = check_target(arguments.target)

    import torch

    from data_pipeline.loader import MicroBatch
    from train.runtime import start_runtime, stop_runtime
    from train.tasks.classification import evaluate_split

    trained = read_trained(target, arguments.weights, arguments.data)
    config, checkpoint, weights = trained.config, trained.checkpoint, trained.weights
    manifest = open_dataset(config.data, training=False)
    if list(manifest.classes) != trained.classes:
        raise ConfigError(f"{config.data.path} has other classes than {checkpoint} was trained on")

    runtime = start_runtime()
    model = trained.model().to(runtime.device)

    def meet(batch: MicroBatch) -> None:
        for fault in batch.faults:
            print(f"rank {runtime.rank} reads {fault.file} again: {fault.count} x {fault.error}", file=sys.stderr)
        for sample in batch.bad:
            print(f"left out: {sample.sentence}", file=sys.stderr)

    with torch.no_grad():
        scores, _ = evaluate_split(model, config, manifest, runtime, meet)
    if runtime.is_main and arguments.json:
        print(json.dumps({"checkpoint": str(checkpoint), "weights": weights, "data": config.data.path, **asdict(scores)}))
    elif runtime.is_main:
        print(f"{checkpoint} ({weights}) on {config.data.path}: top-1 {scores.top1:.2f} %  top-5 {scores.top5:.2f} %", end="  ")
        print(f"loss {scores.loss:.4f}  ({scores.count} images)")
    stop_runtime()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Evaluate in fp32 on the val split, every sample once; several ranks share the work.")
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest sound checkpoint) or a checkpoint's")
    parser.add_argument("--weights", choices=["ema", "model"], help="which weights (default: ema where the run has it)")
    parser.add_argument("--data", metavar="PATH", help="a prepared dataset (default: the run's own)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, unrounded")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
