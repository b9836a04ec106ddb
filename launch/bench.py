#!/usr/bin/env python
"""Measure the data path or a training step on this machine: python launch/bench.py data|train"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import EXIT_CONFIG, EXIT_DATA, Parser, fail


def main() -> int:
    arguments = parse_arguments()
    from data_pipeline.manifest import DataError, open_manifest
    from train.config import ConfigError, load_config

    try:
        config = load_config(arguments.config, arguments.overrides)
        manifest = open_manifest(config.data.path)
        from train.bench import bench_data, bench_train, table

        if arguments.what == "data":
            rates = bench_data(manifest.split("train"), config.data.backend, config.data.image_size, arguments.images)
            print(table(rates, "img/s/core"))
            return 0
        from train.runtime import start_runtime, stop_runtime

        runtime = start_runtime()
        rates = bench_train(config, len(manifest.classes), runtime, arguments.steps)
        if runtime.is_main:
            print(table(rates, "img/s"))
        stop_runtime()
    except ConfigError as error:
        return fail(EXIT_CONFIG, error)
    except DataError as error:
        return fail(EXIT_DATA, error)
    return 0


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
    sys.exit(main())
