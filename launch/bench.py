#!/usr/bin/env python
"""Measure the data path or a training step on this machine: python launch/bench.py data|train"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, run


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.manifest import open_manifest
    from train.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    manifest = open_manifest(config.data.path)
    from train.bench import bench_data, bench_train, table
    from train.runtime import start_runtime, stop_runtime

    if arguments.what == "data":
        print(table(bench_data(manifest.split("train"), config.data.backend, config.data.image_size, arguments.images), "img/s/core"))
        return
    runtime = start_runtime()
    rates = bench_train(config, len(manifest.classes), runtime, arguments.steps)
    if runtime.is_main:
        print(table(rates, "img/s"))
    stop_runtime()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Measure beside plain alternatives, interleaved in one run; medians of five rounds.")
    parser.add_argument("what", choices=["data", "train"], help="data: decoding on one core; train: whole training steps")
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", metavar="FILE", help="whose model, dataset and sizes (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=500, help="data: images per round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="train: steps per round (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
