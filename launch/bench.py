#!/usr/bin/env python
"""Measure on this machine: python launch/bench.py data|train|guard|model|models|segmenters|detectors|kernels"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, add_local_rank, add_overrides, check_output, leave, number, run

if TYPE_CHECKING:
    import torch

    from benchmarks.roofline import Roofline
    from data_pipeline.manifest import Manifest
    from train.config import Config


def main(arguments: argparse.Namespace) -> None:
    from benchmarks.environment import machine, versions

    if arguments.json:
        check_output("--json", arguments.json, parents=True)
    benchmarks = {
        "data": bench_data,
        "train": bench_train,
        "guard": bench_guard,
        "model": bench_model,
        "models": bench_models,
        "segmenters": bench_segmenters,
        "detectors": bench_detectors,
        "kernels": bench_kernels,
    }
    results = benchmarks[arguments.what](arguments)
    if arguments.json and results:
        about = {"command": " ".join(sys.argv), "date": date.today().isoformat(), "machine": machine(), **versions()}
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps({**about, **results}, indent=1) + "\n")


def bench_data(arguments: argparse.Namespace) -> dict:
    config, manifest = read_config(arguments)
    from benchmarks import data

    return data.run(config, manifest, arguments.images, arguments.rounds, arguments.gpu_rate)


def bench_train(arguments: argparse.Namespace) -> dict | None:
    config, manifest = read_config(arguments)
    from benchmarks import train_step
    from train.engine.runtime import start_runtime, stop_runtime

    results = train_step.run(config, manifest, start_runtime(), arguments.steps, arguments.rounds)
    stop_runtime()
    return results


def bench_guard(arguments: argparse.Namespace) -> dict | None:
    config, manifest = read_config(arguments)
    from benchmarks import train_step
    from train.engine.runtime import start_runtime, stop_runtime

    results = train_step.run_guard(config, manifest, start_runtime(), arguments.steps)
    stop_runtime()
    return results


def bench_model(arguments: argparse.Namespace) -> dict:
    import catmodel

    names = choose("--models", arguments.models.split(","), catmodel.list_models())
    from benchmarks import model

    ways = choose("--ways", arguments.ways.split(",") if arguments.ways else model.WAYS, model.WAYS + model.OTHERS)
    modes = model.MODES if arguments.mode == "both" else (arguments.mode,)
    if "training" in modes:
        check_batch(arguments.batch, names)
    device, precision, roofline = assumed_device(arguments) if arguments.count_only else this_device(arguments)
    batch, steps, rounds = arguments.batch or (8 if device.type == "cpu" else 128), arguments.steps, arguments.rounds
    rows = model.run(names, modes, ways, device, precision, roofline, batch, steps, rounds, arguments.profile)
    settings = {"batch": batch, "precision": precision, "rounds": rounds, "steps": steps}
    return {**settings, "models": rows, **describe(roofline)}


def bench_models(arguments: argparse.Namespace) -> dict:
    from importlib.metadata import version

    from benchmarks.families import PEERS, count_models, time_models
    from benchmarks.tables import count_table, speed_table

    if arguments.speed:
        check_batch(arguments.batch, PEERS)
    results: dict = {"torch": version("torch"), "timm": version("timm"), "counts": count_models()}
    print(count_table(results["counts"]), flush=True)
    if arguments.speed:
        from train.engine.runtime import keep_memory

        keep_memory()  # as in training
        batch, steps, rounds = arguments.batch or 4, arguments.steps, arguments.rounds
        results |= {"batch": batch, "steps": steps, "rounds": rounds, "speed": time_models(batch, steps, rounds)}
        print(f"\n{speed_table(results['speed'])}")
    return results


def bench_segmenters(arguments: argparse.Namespace) -> dict:
    from benchmarks.segmenters import TIMED, compare_steps, count_segmenters
    from benchmarks.tables import segmenter_table

    return bench_dense(arguments, count_segmenters, segmenter_table, TIMED, compare_steps)


def bench_detectors(arguments: argparse.Namespace) -> dict:
    from benchmarks.detectors import TIMED, compare_steps, count_detectors
    from benchmarks.tables import detector_table

    return bench_dense(arguments, count_detectors, detector_table, TIMED, compare_steps)


def bench_dense(
    arguments: argparse.Namespace, count: Callable, table: Callable, timed: Sequence[str], compare_steps: Callable
) -> dict:
    """Networks for a dense task, by its functions of benchmarks/; `compare_steps` trains the models `timed`."""
    from benchmarks.tables import dense_steps_table

    if arguments.speed:
        check_batch(arguments.batch, timed)
    results: dict = {"counts": count()}
    print(table(results["counts"]), flush=True)
    if arguments.speed:
        from train.engine.runtime import keep_memory

        keep_memory()  # as in training
        batch, rounds = arguments.batch or 4, arguments.rounds
        results |= {"batch": batch, "rounds": rounds, "steps": compare_steps(batch, rounds)}
        print(f"\n{dense_steps_table(results['steps'])}")
    return results


def bench_kernels(arguments: argparse.Namespace) -> dict:
    if arguments.compile_only:
        from benchmarks.kernel_resources import SHARED, resources
        from train.telemetry.formatting import table

        rows = [row for capability in SHARED for row in resources(capability)]
        print(table([list(rows[0]), *(list(map(str, row.values())) for row in rows)]))
        return {"resources": rows}
    import torch

    from train.config import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError(
            "bench.py kernels needs a GPU; without one, --compile-only shows the resources that the kernels need on an "
            "A100, H100 or H200"
        )
    from benchmarks.kernels import bench_kernels, kernel_table
    from train.engine.deepspeed_engine import DTYPES

    device, precision, roofline = this_device(arguments)
    batch = arguments.batch or 128
    rows = list(bench_kernels(device, DTYPES[precision], batch, roofline))
    print(kernel_table(rows))
    return {"batch": batch, "precision": precision, "rows": rows, **describe(roofline)}


def read_config(arguments: argparse.Namespace) -> "tuple[Config, Manifest]":
    """The config, and the manifest of its dataset."""
    from data_pipeline.manifest import open_manifest
    from train.config import ConfigError, load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.train.micro_batch == "auto":
        raise ConfigError("bench.py needs a number of images: give train.micro_batch=N train.global_batch=N")
    return config, open_manifest(config.data.path)


def check_batch(batch: int | None, models: Iterable[str]) -> None:
    """Raise ConfigError if one of `models` cannot be trained on `batch` images. None: the default, which is enough."""
    import catmodel
    from train.config import ConfigError

    for name in models:
        if batch is not None and batch < (least := catmodel.least_images(name)):
            raise ConfigError(f"--batch {batch} is too small to train {name}: its batch norms need {least} images")


def choose(option: str, given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """`given` as a tuple. Raises ConfigError if one of them is not known."""
    from train.config import ConfigError

    if unknown := set(given) - set(known):
        raise ConfigError(f"{option} {','.join(sorted(unknown))}: known are {', '.join(known)}")
    return tuple(given)


def assumed_device(arguments: argparse.Namespace) -> "tuple[torch.device, str, Roofline]":
    """The meta device, the precision, and the roofline that was measured on an H200."""
    import torch

    from benchmarks.roofline import H200

    return torch.device("meta"), arguments.precision or "bf16", H200


def this_device(arguments: argparse.Namespace) -> "tuple[torch.device, str, Roofline]":
    """This machine's device, the precision, and the roofline, measured now."""
    import torch

    from benchmarks.environment import machine
    from benchmarks.roofline import measure_roofline
    from train.engine.deepspeed_engine import DTYPES
    from train.engine.runtime import keep_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cpu":
        keep_memory()  # as in training
    roofline = measure_roofline(device, DTYPES[precision])
    copied, multiplied = roofline.bandwidth / 1e9, roofline.flops / 1e12
    print(f"{machine()}: {copied:.1f} GB/s copied, {multiplied:.3g} TFLOP/s multiplied in {precision}", flush=True)
    return device, precision, roofline


def describe(roofline: "Roofline") -> dict:
    return {"roofline": {"gigabytes_per_second": roofline.bandwidth / 1e9, "tflops": roofline.flops / 1e12}}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Compare with alternatives, interleaved in one run; results are medians over the rounds.",
        epilog="data: loading; train: training steps; guard: cost of the guard in a step; model: models compared with "
        "alternatives; models: all models compared with their papers; segmenters, detectors: those for segmentation "
        "and detection; kernels: kernels compared with plain PyTorch",
    )
    choices = ["data", "train", "guard", "model", "models", "segmenters", "detectors", "kernels"]
    parser.add_argument("what", choices=choices, help="what to measure")
    parser.add_argument(
        "--config",
        default="configs/quickstart.yaml",
        metavar="FILE",
        help="data, train, guard: the recipe with model, dataset and sizes (default: %(default)s)",
    )
    count = number(int, 1)
    parser.add_argument("--images", type=count, default=512, help="data: images per round (default: %(default)s)")
    parser.add_argument(
        "--gpu-rate",
        type=number(float, 1),
        default=2000,
        help="data: images/s of a GPU, to compute the cores that it needs (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=count, default=5, help="train, model: steps per round; guard: steps (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument(
        "--models", default="cat_base", metavar="NAME,…", help="model: names of models (default: %(default)s)"
    )
    parser.add_argument(
        "--ways",
        metavar="WAY,…",
        help="model: ours, compiled, plain (no kernels), released (recomputation and copies, as in the released code), "
        "timm (default: all of these); channels_last",
    )
    parser.add_argument(
        "--mode", choices=["training", "inference", "both"], default="both", help="model: (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="model, models, segmenters, detectors, kernels: images (default: 128 on a GPU, 8 on a CPU)",
    )
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="model, kernels: (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="model: also write Chrome traces into FOLDER, and print the operators that took longest",
    )
    parser.add_argument(
        "--count-only",
        action="store_true",
        help="model: count FLOPs and bytes, and the speed that they allow on an H200, without running anything",
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="kernels: registers, shared memory and spills on an A100, H100 or H200; needs no GPU",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="models: also time one model of each family and timm's models of its size; segmenters, "
        "detectors: also compare a training step with a classifier's; on the CPU",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    add_local_rank(parser)
    add_overrides(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
