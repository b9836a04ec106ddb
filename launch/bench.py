#!/usr/bin/env python
"""Measure the data path, a training step, the guard's cost or all models on this machine: python launch/bench.py data|train|guard|models"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, run


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.manifest import open_manifest
    from train.config import load_config

    if arguments.what == "models":
        results = bench_models(arguments)
    else:
        config = load_config(arguments.config, arguments.overrides)
        manifest = open_manifest(config.data.path)
        results = {"data": bench_data, "train": bench_train, "guard": bench_guard}[arguments.what](arguments, config, manifest)
    if arguments.json and results:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        results = {"command": " ".join(sys.argv), "date": date.today().isoformat(), "machine": machine(), **results}
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


def bench_data(arguments: argparse.Namespace, config, manifest) -> dict:
    """One core: decoding beside its peers, the whole training path beside timm's, every operation's cost; then the loader on all cores."""
    import time

    import torch

    from data_pipeline import augment_bench, bench

    torch.set_num_threads(1)
    images = bench.Images.of(manifest.split("train"), arguments.images, config.data.image_size, config.augment)
    count, cores = len(images.ids), len(os.sched_getaffinity(0))
    results = {"images": count, "size": images.size, "rounds": arguments.rounds, "absent": bench.absent(images.split)}

    def measure(name: str, title: str, ways: dict, base: str, clock=time.process_time, unit: str = "img/s/core") -> dict:
        rows = bench.summary(bench.interleave(ways, count, arguments.rounds, clock), base)
        results[name] = {"unit": unit, "base": base, "rows": rows}
        print(f"\n{title}\n{bench.table(rows, unit, base)}", flush=True)
        return rows

    pillow = "Pillow, the same windows"
    rows = measure("decoding", f"decode + random resized crop {images.size} + flip → uint8", bench.decoding(images), pillow)
    bare = rows["bare full decode (libjpeg-turbo)"]["median"]
    print("\n".join(f"{name:44}{row['median'] / bare:14.2f} x bare full decode" for name, row in rows.items()))
    timm = "timm create_transform, the same recipe"
    path = measure("training_path", "the whole training path → normalised float batch", bench.training_path(images), timm)
    loader = measure(
        "loader",
        f"ready batches on {cores} cores, wall clock",
        bench.loading(images, config.data, cores),
        "this decoder, 1 thread",
        time.perf_counter,
        "img/s",
    )
    results["loader"]["share"] = share = next(iter(loader.values()))["ratio"] / cores
    print(f"the loader reaches {share:.2f} of the decoder's own rate x {cores} cores")
    results["operations"] = augment_bench.operation_costs(images.size)
    print("\nthe recipe, milliseconds per image and operation")
    print("\n".join(f"{name:44}{cost:14.3f}" for name, cost in results["operations"].items()))
    decoded, augmented = rows["webdataset backend"]["median"], next(iter(path.values()))["median"]
    needed = {"gpu_rate": arguments.gpu_rate, "decoding": arguments.gpu_rate / decoded, "recipe_too": arguments.gpu_rate / augmented}
    results["cores_per_gpu"] = needed
    print(
        f"\na GPU that trains {arguments.gpu_rate:g} images/s needs {needed['decoding']:.1f} of these cores to decode for it"
        f" ({needed['recipe_too']:.1f} where the recipe ran on them, too)"
    )
    print("\n".join(results["absent"]))
    return results


def bench_train(arguments: argparse.Namespace, config, manifest) -> dict | None:
    """Training steps under DeepSpeed beside a bare PyTorch loop. Results on the main rank only."""
    from data_pipeline.bench import summary, table
    from train.bench import bench_train
    from train.runtime import start_runtime, stop_runtime

    runtime = start_runtime()
    rows = summary(bench_train(config, len(manifest.classes), runtime, arguments.steps, arguments.rounds), "bare PyTorch")
    if runtime.is_main:
        print(table(rows, "img/s", "bare PyTorch"))
    stop_runtime()
    return {"train": rows} if runtime.is_main else None


def bench_guard(arguments: argparse.Namespace, config, manifest) -> dict | None:
    """The guard's share of a training step, over all ranks that this is started on. Results on the main rank only."""
    import tempfile

    from train.bench import bench_guard
    from train.runtime import start_runtime, stop_runtime

    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as folder:
        cost = bench_guard(config, len(manifest.classes), runtime, arguments.steps, Path(folder))
    if runtime.is_main:
        print(f"{runtime.describe()}: guard {cost['guard_ms']:.3f} ms of a step of {cost['step_ms']:.0f} ms: {cost['share']:.3%}")
        print(f"a checkpoint stops training for {cost['save_stall_ms']:.0f} ms ({cost['save_megabytes']:.0f} MB of rank 0)")
    stop_runtime()
    return {"guard": {"world_size": runtime.world, **cost}} if runtime.is_main else None


def bench_models(arguments: argparse.Namespace) -> dict:
    """All models' parameters and MACs beside their papers' figures; with --speed one of each family beside timm's."""
    from importlib.metadata import version

    from launch.models_page import count_table, speed_table
    from train.bench_models import count_models, time_models

    results: dict = {"torch": version("torch"), "timm": version("timm"), "counts": count_models()}
    print(count_table(results["counts"]), flush=True)
    if arguments.speed:
        batch, steps, rounds = arguments.batch or 4, arguments.steps, arguments.rounds
        results |= {"batch": batch, "steps": steps, "rounds": rounds, "speed": time_models(batch, steps, rounds)}
        print(f"\n{speed_table(results['speed'])}")
    return results


def machine() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Measure beside plain alternatives, interleaved in one run; medians of the rounds.")
    parser.add_argument(
        "what",
        choices=["data", "train", "guard", "models"],
        help="data: loading; train: training steps; guard: what it costs of one; models: all of them beside their papers",
    )
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", metavar="FILE", help="whose model, dataset and sizes (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=512, help="data: images per round (default: %(default)s)")
    parser.add_argument(
        "--gpu-rate", type=float, default=2000, help="data: images/s of a GPU, for the cores it needs (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="train: steps per round; guard: steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, interleaved (default: %(default)s)")
    parser.add_argument("--speed", action="store_true", help="models: also time one of each family beside timm's, on the CPU")
    parser.add_argument("--batch", type=int, metavar="N", help="models: images a step (default: 4)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
