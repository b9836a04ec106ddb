#!/usr/bin/env python
"""Measure on this machine: python launch/bench.py data|train|guard|model|models|kernels"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, leave, run


def main(arguments: argparse.Namespace) -> None:
    benches = {
        "data": bench_data,
        "train": bench_train,
        "guard": bench_guard,
        "model": bench_model,
        "models": bench_models,
        "kernels": bench_kernels,
    }
    results = benches[arguments.what](arguments)
    if arguments.json and results:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        results = {"command": " ".join(sys.argv), "date": date.today().isoformat(), "machine": machine(), **versions(), **results}
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


def prepared(arguments: argparse.Namespace) -> tuple:
    """The config, and the manifest of its dataset."""
    from data_pipeline.manifest import open_manifest
    from train.config import ConfigError, load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.train.micro_batch == "auto":
        raise ConfigError("bench.py needs a number of images: give train.micro_batch=N train.global_batch=N")
    return config, open_manifest(config.data.path)


def bench_data(arguments: argparse.Namespace) -> dict:
    """One core: decoding beside its peers, the whole training path beside timm's, every operation's cost; then the loader on all cores."""
    import time

    import torch

    from data_pipeline import augment_bench, bench

    config, manifest = prepared(arguments)
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


def bench_train(arguments: argparse.Namespace) -> dict | None:
    """Training steps under DeepSpeed beside a bare PyTorch loop; then where the time of real ones goes. Results on the main rank only."""
    from benchmarks.data import summary, table
    from benchmarks.train_step import bench_train, split_step
    from train.engine.runtime import start_runtime, stop_runtime

    config, manifest = prepared(arguments)
    runtime = start_runtime()
    rows = summary(bench_train(config, len(manifest.classes), runtime, arguments.steps, arguments.rounds), "bare PyTorch")
    split = split_step(config, manifest, runtime, arguments.steps * arguments.rounds)
    stop_runtime()
    if not runtime.is_main:
        return None
    overhead = 1 / next(iter(rows.values()))["ratio"] - 1
    print(table(rows, "img/s", "bare PyTorch"))
    print(f"DeepSpeed takes {overhead:+.1%} of a bare step's time")
    print("a step from prepared data: " + ", ".join(f"{phase} {spent:.1f} ms" for phase, spent in split.items()))
    return {"train": rows, "overhead": overhead, "milliseconds": split, "precision": config.train.precision, "model": config.model.name}


def bench_guard(arguments: argparse.Namespace) -> dict | None:
    """The guard's share of a training step, over all ranks that this is started on. Results on the main rank only."""
    import tempfile

    from benchmarks.train_step import bench_guard
    from train.engine.runtime import start_runtime, stop_runtime

    config, manifest = prepared(arguments)
    runtime = start_runtime()
    with tempfile.TemporaryDirectory() as folder:
        cost = bench_guard(config, len(manifest.classes), runtime, arguments.steps, Path(folder))
    if runtime.is_main:
        print(f"{runtime.describe()}: guard {cost['guard_ms']:.3f} ms of a step of {cost['step_ms']:.0f} ms: {cost['share']:.3%}")
        print(f"a checkpoint stops training for {cost['save_stall_ms']:.0f} ms ({cost['save_megabytes']:.0f} MB of rank 0)")
    stop_runtime()
    return {"guard": {"world_size": runtime.world, **cost}} if runtime.is_main else None


def bench_model(arguments: argparse.Namespace) -> dict:
    """Models beside the same models done otherwise, and beside others of their size; and the roofline of the device."""
    import catmodel
    from train.config import ConfigError

    def check(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
        if not set(given) <= set(known):
            raise ConfigError(f"{kind} {','.join(sorted(set(given) - set(known)))}: known are {', '.join(known)}")

    names = arguments.models.split(",")
    check("--models", names, catmodel.list_models())
    from benchmarks.model import MODES, OTHERS, WAYS, Setting, bench_model, count_model, model_table, profile

    ways = tuple(arguments.ways.split(",")) if arguments.ways else WAYS
    check("--ways", ways, WAYS + OTHERS)
    device, dtype, precision, roofline = predicted(arguments) if arguments.count_only else on_this_device(arguments)
    batch = arguments.batch or (8 if device.type == "cpu" else 128)
    results: dict = {"batch": batch, "precision": precision, "rounds": arguments.rounds, "steps": arguments.steps, "models": {}}
    for name in names:
        of_model = results["models"][name] = {}
        for mode in MODES if arguments.mode == "both" else (arguments.mode,):
            setting = Setting(device, dtype, batch, mode == "training")
            if arguments.count_only:
                rows = of_model[mode] = {"rows": count_model(name, setting, roofline, ways)}
                print(f"\n{name}, {mode}, {precision}, batch {batch}")
                for way, row in rows["rows"].items():
                    print(f"{way:32}{row['gflops']:8.1f} GFLOP{row['megabytes']:8.0f} MB an image: at most{row['floor']:7.0f} img/s")
                continue
            rows = bench_model(name, setting, roofline, ways, arguments.steps, arguments.rounds)
            of_model[mode] = {"rows": rows}
            print(f"\n{name}, {mode}, {precision}, batch {batch}\n{model_table(rows)}", flush=True)
            if arguments.profile:
                top = of_model[mode]["profile"] = profile(name, setting, Path(arguments.profile))
                print(f"\ntrace: {arguments.profile}/{name}-{mode}.json; milliseconds per step")
                print("\n".join(f"{row['milliseconds']:10.2f}{row['calls']:8.0f} x {row['name'][:110]}" for row in top), flush=True)
    return {**results, **roofline_of(roofline)}


def bench_kernels(arguments: argparse.Namespace) -> dict:
    """Kernels beside their plain twins; or, without a GPU, what they take of one."""
    from train.config import ConfigError

    if arguments.compile_only:
        from catmodel.kernels.report import resources, table

        rows = resources()
        print(table(rows))
        return {"resources": rows}
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("bench.py kernels needs a GPU; without one, --compile-only says what the kernels take of an H100 or H200")
    from benchmarks.kernels import bench_kernels, kernel_table

    device, dtype, precision, roofline = on_this_device(arguments)
    batch = arguments.batch or 128
    rows = bench_kernels(device, dtype, batch, roofline, arguments.rounds)
    print(kernel_table(rows))
    return {"batch": batch, "precision": precision, "rows": rows, **roofline_of(roofline)}


def predicted(arguments: argparse.Namespace) -> tuple:
    """The same as `on_this_device`, of an H200: what copies and matrix products were measured to reach on one."""
    import torch

    from benchmarks.roofline import H200

    precision = arguments.precision or "bf16"
    return torch.device("meta"), {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], precision, H200


def on_this_device(arguments: argparse.Namespace) -> tuple:
    """The device, the precision as a dtype and by its name, and the roofline, measured now."""
    import torch

    from benchmarks.roofline import measure_roofline
    from train.engine.runtime import keep_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if device.type == "cpu":
        keep_memory()  # as training does, for all ways alike
    roofline = measure_roofline(device, dtype)
    print(
        f"{machine()}: {roofline.bandwidth / 1e9:.1f} GB/s copied, {roofline.flops / 1e12:.3g} TFLOP/s multiplied in {precision}",
        flush=True,
    )
    return device, dtype, precision, roofline


def roofline_of(roofline) -> dict:
    return {"roofline": {"gigabytes_per_second": roofline.bandwidth / 1e9, "tflops": roofline.flops / 1e12}}


def bench_models(arguments: argparse.Namespace) -> dict:
    """All models' parameters and MACs beside their papers' figures; with --speed one of each family beside timm's."""
    from importlib.metadata import version

    from benchmarks.families import count_models, time_models
    from benchmarks.tables import count_table, speed_table

    results: dict = {"torch": version("torch"), "timm": version("timm"), "counts": count_models()}
    print(count_table(results["counts"]), flush=True)
    if arguments.speed:
        from train.engine.runtime import keep_memory

        keep_memory()  # as training does, for all models alike
        batch, steps, rounds = arguments.batch or 4, arguments.steps, arguments.rounds
        results |= {"batch": batch, "steps": steps, "rounds": rounds, "speed": time_models(batch, steps, rounds)}
        print(f"\n{speed_table(results['speed'])}")
    return results


def machine() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    cores = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    torch = sys.modules.get("torch")
    return f"{torch.cuda.get_device_name()}, {cores}" if torch and torch.cuda.is_available() else cores


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # there is no Triton where there can be no NVIDIA GPU
            found[name] = "not installed"
    return found


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Measure beside plain alternatives, interleaved in one run; medians of the rounds.")
    parser.add_argument(
        "what",
        choices=["data", "train", "guard", "model", "models", "kernels"],
        help="data: loading; train: training steps; guard: what it costs of one; model: models beside others; models: all of them beside "
        "their papers; kernels: beside their twins",
    )
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", metavar="FILE", help="whose model, dataset and sizes (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=512, help="data: images per round (default: %(default)s)")
    parser.add_argument(
        "--gpu-rate", type=float, default=2000, help="data: images/s of a GPU, for the cores it needs (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="train, model: steps per round; guard: steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, interleaved (default: %(default)s)")
    parser.add_argument("--models", default="cat_base", metavar="NAME,…", help="model: which (default: %(default)s)")
    parser.add_argument(
        "--ways",
        metavar="WAY,…",
        help="model: ours, compiled, plain (no kernels), released (its cost: recomputation, copies), timm (default: these); channels_last",
    )
    parser.add_argument("--mode", choices=["training", "inference", "both"], default="both", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=int, metavar="N", help="model, models, kernels: images (default: 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="model, kernels (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--profile", metavar="FOLDER", help="model: also write a Chrome trace there, and print what took longest")
    parser.add_argument("--count-only", action="store_true", help="model: FLOPs and bytes, and what they allow an H200; runs nothing")
    parser.add_argument(
        "--compile-only", action="store_true", help="kernels: registers, memory and spills on an H100 or H200; needs no GPU"
    )
    parser.add_argument("--speed", action="store_true", help="models: also time one of each family beside timm's, on the CPU")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
