#!/usr/bin/env python
"""What a run will take, before it is run.

python launch/plan.py --config F --nodes N --gpus-per-node G --images-per-second R
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, add_overrides, check_output, number, run

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from operate.plan.cluster import Cluster
    from operate.plan.plan import Plan
    from train.config import Config

DECODING = "docs/results/data-cpu.json"
IMAGENET = 1_281_167, 50_000  # training and validation images


def main(arguments: argparse.Namespace) -> None:
    from train.config import ConfigError, load_config

    if arguments.compare:
        from operate.plan.record import compare

        print(compare(arguments.compare))
        return
    if not (arguments.config and arguments.nodes and arguments.gpus_per_node):
        raise ConfigError(
            "plan.py needs --config, --nodes and --gpus-per-node; or --compare and plans that --json has written"
        )
    for option in ("plot", "json"):
        if path := getattr(arguments, option):
            check_output(f"--{option}", path)
    if arguments.plot and not arguments.plot.endswith(".png"):
        raise ConfigError(f"--plot {arguments.plot} is written as PNG: give it a name that ends in .png")
    config = load_config(arguments.config, arguments.overrides)
    images, validation_images, manifest, where = find_dataset(arguments, config)
    cluster = assume(arguments, config)
    measured = None
    if arguments.calibrate:
        from operate.plan.calibrate import read_run

        measured = read_run(arguments.calibrate)
    elif cluster.images_per_second is None:
        raise ConfigError(
            "the speed of a GPU is not known: give --images-per-second, --calibrate RUN, or --bench FILE of "
            "launch/bench.py train"
        )

    from operate.plan.workload import check_sizes, count_workload, memory_by_stage
    from train.checks import checked_order

    check_sizes(config, images, cluster.world)
    from operate.plan.plan import make_plan, scale
    from operate.task_model import task_of

    task = task_of(config, manifest)
    groups = checked_order(config, manifest).groups if manifest and not arguments.images else None
    workload = count_workload(task, images, validation_images, groups)
    if measured:
        from operate.plan.calibrate import calibrate

        cluster = assume(arguments, config, calibrate(cluster, workload, config, measured))
    runs, seed = arguments.runs, arguments.seed
    own = make_plan(workload, cluster, runs, seed)
    best = make_plan(workload, cluster, runs, seed, best=True)
    plans = scale(workload, cluster, runs, seed)
    memory = memory_by_stage(task, cluster.world)

    from operate.plan import text
    from train.telemetry.formatting import page_width, wrapped

    title = f"{config.model.name}, {Path(arguments.config).stem}"
    dataset = f"dataset: {images:,} images, {where}; simulated: {runs} runs, seed {seed}"
    print(f"{text.page(title, own, best, memory, plans)}\n\n{wrapped(dataset, page_width())}")
    if measured:
        print(f"\nprediction and reality\n{reality(arguments, own)}")
    if arguments.plot:
        from operate.plan.plot import plot

        plot(Path(arguments.plot), title, own, best, plans, runs, seed)
        print(f"plot: {arguments.plot}")
    if arguments.json:
        from operate.plan.record import record

        result = {"command": " ".join(sys.argv), **record(title, own, best, memory, plans)}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


def assume(arguments: argparse.Namespace, config: "Config", calibrated: "Cluster | None" = None) -> "Cluster":
    """The cluster's numbers, in rising priority: guesses, --bench files, the run's `calibrated` ones, given options."""
    from operate.plan.cluster import NUMBERS, Cluster, read_bench

    cluster = calibrated or Cluster(arguments.nodes, arguments.gpus_per_node)
    if not calibrated:
        root = Path(__file__).resolve().parents[1]
        values, origin = read_bench(str(root / DECODING), config)
        cluster = cluster.with_values(values, origin.replace(str(root / DECODING), DECODING))
        for path in arguments.bench:
            cluster = cluster.with_values(*read_bench(path, config))
    given = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    return cluster.with_values(given, "given")


def find_dataset(arguments: argparse.Namespace, config: "Config") -> "tuple[int, int, Manifest | None, str]":
    """Numbers of training and validation images, the manifest (None without a dataset), and the numbers' origin."""
    from train.checks import visible_dataset

    (images, validation_images), manifest = IMAGENET, visible_dataset(config)
    where = "GUESSED to be ImageNet's, as there is no dataset at data.path"
    if manifest:
        images = manifest.split("train").samples
        validation_images = manifest.splits["val"].samples if "val" in manifest.splits else 0
        where = f"counted in {config.data.path}"
    if arguments.images:
        images, where = arguments.images, "given"
    return images, validation_images, manifest, where


def reality(arguments: argparse.Namespace, own: "Plan") -> str:
    """A table of a run's time beside the plan's for as many steps: on average, and with the run's own failures."""
    from operate.plan.calibrate import read_run
    from operate.plan.closed_form import expected
    from operate.plan.simulate import simulate
    from operate.plan.text import beside

    measured = read_run(arguments.against or arguments.calibrate)
    timeline = replace(own.timeline, steps=measured.steps)
    replayed = simulate(timeline, arguments.seed, measured.failures)
    return beside(measured, expected(timeline), replayed, own.step.data_wait / own.step.seconds)


def parse_arguments() -> argparse.Namespace:
    from operate.plan.cluster import NUMBERS

    parser = Parser(
        description="What a run will take on a cluster: its step by ZeRO stage, memory, cores, checkpoint interval, "
        "goodput, time, price; by a closed form, and beside it a simulation of failures, waits and stragglers. Each "
        "number says where it came from.",
        epilog="docs/plan.md says how to read it",
    )
    parser.add_argument("--config", metavar="FILE", help="recipe, e.g. configs/cat_b.yaml")
    parser.add_argument("--nodes", type=number(int, 1), metavar="N")
    parser.add_argument("--gpus-per-node", type=number(int, 1), metavar="G")
    parser.add_argument(
        "--bench",
        action="append",
        default=[],
        metavar="FILE",
        help="what launch/bench.py … --json FILE measured; several times",
    )
    parser.add_argument(
        "--calibrate",
        metavar="RUN",
        help="a run's folder: what it measured, in place of guesses; and prediction beside reality",
    )
    parser.add_argument("--against", metavar="RUN", help="beside this run's reality instead of the calibrating one's")
    parser.add_argument(
        "--images",
        type=number(int, 1),
        metavar="N",
        help="training images (default: those of data.path, or ImageNet's)",
    )
    parser.add_argument(
        "--runs",
        type=number(int, 1),
        default=20,
        metavar="N",
        help="simulated runs for each mean (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    parser.add_argument("--compare", nargs="+", metavar="FILE", help="plans that --json has written, side by side")
    numbers = parser.add_argument_group("assumptions")
    for name, entry in NUMBERS.items():
        unit = entry.metadata["unit"].replace("%", "%%")
        guess = "" if entry.default is None else f" (guess: {entry.default:g})"
        text = f"{unit}: {entry.metadata['help']}{guess}"
        numbers.add_argument(f"--{name.replace('_', '-')}", type=number(float, 0), metavar="X", help=text)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.against and not arguments.calibrate:
        parser.error("--against needs --calibrate: a plan of guesses is not compared with a run")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
