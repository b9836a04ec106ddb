#!/usr/bin/env python
"""Evaluate a checkpoint on the val split of a dataset: python launch/evaluate.py runs/cifar10"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, add_choice_of_weights, add_local_rank, add_overrides, check_output, leave, run
from launch.ranks import adopt_slurm_ranks

if TYPE_CHECKING:
    from train.config import Config

# What an evaluation may change, whatever the task; for more, see TaskConfig.evaluation_keys, Task.evaluation_settings.
SETTINGS = (
    *("data.path", "data.backend", "data.device", "data.interpolation", "data.workers", "data.prefetch"),
    "train.micro_batch",
)


def main(arguments: argparse.Namespace) -> None:
    adopt_slurm_ranks()
    from data_pipeline.storage import open_dataset
    from train.checkpoint.trained_model import check_target, read_trained
    from train.config import ConfigError

    target = check_target(arguments.target, arguments.best)
    for option in ("details", "results"):
        if path := getattr(arguments, option):
            check_output(f"--{option}", path)

    import torch

    from data_pipeline.loader import MicroBatch
    from train.engine.runtime import start_runtime, stop_runtime
    from train.tasks.base import build_task, evaluate
    from train.telemetry.monitor import finite, progress_bar

    trained = read_trained(target, arguments.weights, best=arguments.best)
    config, checkpoint, weights = trained.config, trained.checkpoint, trained.weights
    config = for_evaluation(config, arguments.overrides, arguments.data, arguments.cache_dir)
    manifest = open_dataset(config.data, training=False)
    config.check_dataset(manifest)
    if list(manifest.classes) != trained.classes:
        raise ConfigError(f"{config.data.path} has other classes than {checkpoint} was trained on")

    runtime = start_runtime()
    model, task = trained.model().to(runtime.device), build_task(config, manifest.classes)

    split = manifest.split("val")
    bar = progress_bar(split.samples, f" {task.samples}", shown=runtime.is_main)

    def report(batch: MicroBatch) -> None:
        for fault in batch.faults:
            bar.write(f"rank {runtime.rank} reads {fault.file} again: {fault.count} x {fault.error}", file=sys.stderr)
        for sample in batch.bad:
            bar.write(f"left out: {sample.sentence}", file=sys.stderr)
        bar.update(min(len(batch.ids) * runtime.world, split.samples - bar.n))  # the other ranks have as many

    tally = task.tally(runtime.device, split)
    if arguments.results and not task.has_results:
        raise ConfigError(f"--results is no option of the task {config.task.name}")
    with bar, torch.no_grad():
        scores, details = evaluate(task, model, split, runtime.device, report, runtime.rank, runtime.world, tally)
    for note in trained.notes if runtime.is_main else ():
        print(note, file=sys.stderr)
    if runtime.is_main and arguments.json:
        numbers = {**finite(scores.values), "count": scores.count}
        print(json.dumps({"checkpoint": str(checkpoint), "weights": weights, "data": config.data.path, **numbers}))
    elif runtime.is_main:
        text = "  ".join(metric.text(scores.values[metric.name]) for metric in task.metrics)
        print(f"{checkpoint} ({weights}) on {config.data.path}: {text}  ({scores.count} {task.samples})")
    if runtime.is_main and arguments.details:
        arguments.details.write_text(json.dumps({"checkpoint": str(checkpoint), "weights": weights, **details}))
    if runtime.is_main and arguments.results:
        tally.write_results(arguments.results)
    stop_runtime()


def for_evaluation(
    config: "Config", settings: Sequence[str], path: str | None = None, cache_dir: str | None = None
) -> "Config":
    """`config` with other settings, another dataset (a folder or URL) and a folder for copies of its files.

    The weights fix the network and what their numbers mean, so a task names what an evaluation may change. Neither ZeRO
    nor the global batch is used in an evaluation: both get values that no check refuses.

    The checkpoint's config may be from a stranger. So its dataset is used only if it is a local folder; a URL to fetch
    from and a folder to write to must be given by the user. Raises ConfigError.
    """
    from train.config import ConfigError, override, parse_config
    from train.task_registry import find

    known = (*SETTINGS, *config.task.evaluation_keys, *find(config.task.name).load().evaluation_settings)
    given = [setting.partition("=")[0] for setting in settings]
    for setting, key in zip(settings, given, strict=True):
        if key == "data.cache_dir":
            raise ConfigError(f"{setting}: give --cache-dir FOLDER in its place")
        if key not in known:
            raise ConfigError(
                f"{setting} cannot be set in an evaluation of task.name={config.task.name}; it takes {', '.join(known)}"
            )
    tree = override(config.model_dump(mode="json"), settings)
    if path is None and "data.path" not in given and "://" in config.data.path:
        raise ConfigError("the run's dataset is behind a URL; name it: --data URL --cache-dir FOLDER")
    path = path or str(tree["data"]["path"])
    if "://" in path and cache_dir is None:
        raise ConfigError("the dataset is behind a URL: give --cache-dir, a folder for its files")
    size = tree["train"]["micro_batch"]
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"train.micro_batch={size}: an evaluation needs a number of images per forward pass")
    tree["train"]["global_batch"] = size
    tree["zero"] = {"stage": 0, "offload": False}
    tree["data"] |= {"path": path, "cache_dir": cache_dir, "cache_gb": None}
    return parse_config(tree, source="evaluate.py")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Evaluate a checkpoint in fp32 on the val split, every sample once. Several ranks share the work."
    )
    parser.add_argument(
        "target",
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a run (then its newest sound checkpoint is used) or of a checkpoint",
    )
    add_choice_of_weights(parser)
    parser.add_argument("--data", metavar="PATH", help="a prepared dataset, or its URL (default: the run's own)")
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="copy the dataset's files there before use; required for a URL"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, unrounded")
    parser.add_argument(
        "--details",
        type=Path,
        metavar="FILE",
        help="write what the task keeps of an evaluation, such as the classes' scores (JSON)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="of a detection: write all detections as COCO's results file, with the source's ids of images and "
        "categories (JSON)",
    )
    add_local_rank(parser)
    add_overrides(parser, "settings of the evaluation that replace the run's, e.g. task.test_flip=true")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))
