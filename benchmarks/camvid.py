#!/usr/bin/env python
"""Train CamVid from scratch on the CPU: configs/camvid.yaml beside torchvision's lraspp_mobilenet_v3_large.

    python benchmarks/camvid.py DATASET [--output runs/camvid] [--epochs N]
    python benchmarks/camvid.py --table

Both networks see the same crops and the same number of images, and are evaluated in the same way; each is trained with
three learning rates, and LR-ASPP with a fourth, because the lowest of its three was the best. A run has one core, and
as many runs are trained at a time as there are cores. Runs that are finished are not repeated. Written are
docs/results/camvid.json and, from it, docs/images/camvid.png; --table makes only the picture and prints the table.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.side_by_side import COLOURS, Run, best, compare, draw_curves

CONFIG = ROOT / "configs/camvid.yaml"
NAMES = {"cotnet": "SE-CoTNetD, Semantic FPN", "lraspp": "torchvision's LR-ASPP"}

RUNS = [
    *(Run("lraspp", "adamw", rate) for rate in (5e-4, 1e-3, 2e-3, 4e-3)),
    *(Run("cotnet", "muon", rate) for rate in (4e-3, 8e-3, 1.6e-2)),
]


def settings(run: Run, options: argparse.Namespace) -> list[str]:
    """The overrides of one run."""
    found = [f"data.path={options.dataset}", f"optimizer.name={run.optimizer}", f"optimizer.lr={run.rate}"]
    if run.optimizer == "adamw":
        found.append("optimizer.betas=[0.9,0.999]")
    if run.model == "lraspp":
        found.append("task.name=lraspp")
    return found + [f"train.epochs={options.epochs}"] * bool(options.epochs)


def command(run: Run, options: argparse.Namespace) -> list[str]:
    """The program that trains one run to its end."""
    return [sys.executable, str(Path(__file__)), "--run", str(options.output / run.name), *settings(run, options)]


def result_of(run: Run, options: argparse.Namespace) -> dict:
    """What came out of a run. seconds: its steps, of median length; some runs were stopped for a while."""
    from train.tasks.segmentation.pictures import class_scores

    output = options.output / run.name
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "eval"]
    last = max(line["step"] for line in found)
    details = {path.stem: json.loads(path.read_text()) for path in (output / "evaluations").glob("*.json")}
    return {
        **run._asdict(),
        "settings": settings(run, options),
        "seconds": round(last * median(line["step_ms"] for line in lines if line["kind"] == "train") / 1000),
        "miou": max(line["miou"] for line in found if line["step"] == last),
        "evaluations": found,
        "classes": details["model"]["classes"],
        "iou": {weights: [score.iou or 0.0 for score in class_scores(found)] for weights, found in details.items()},
    }


def train(output: str, overrides: list[str]) -> None:
    """Train one run, in a process of its own."""
    from train import run
    from train.task_registry import register

    register("lraspp", "benchmarks.lraspp")
    run(CONFIG, overrides, output=output)


def table(result: dict) -> str:
    from benchmarks.markdown import markdown

    rows = [
        [run["model"], run["optimizer"], f"{run['rate']:g}", f"{run['miou']:.1f}", f"{run['seconds'] / 60:.0f}"]
        for run in result["runs"]
    ]
    return markdown(["network", "optimizer", "learning rate", "mIoU, %", "minutes of a core"], rows)


def draw(result: dict, path: Path) -> None:
    """mIoU against the images seen, of all runs, and IoU by class of the best ones."""
    import matplotlib
    from matplotlib.figure import Figure

    chosen = best(result["runs"], "miou")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        curves, bars = figure.subplots(1, 2, width_ratios=(2, 3))
        draw_curves(curves, result, NAMES, "miou", "mIoU on val, %", "miou")
        for number, (model, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            run = chosen[model]
            weights = max(run["iou"], key=lambda name: sum(run["iou"][name]))
            places = [place + 0.4 * number for place in range(len(run["classes"]))]
            bars.bar(places, run["iou"][weights], 0.4, color=colour)
        classes = chosen["cotnet"]["classes"]
        bars.set_xticks([place + 0.2 for place in range(len(classes))], classes, rotation=30, ha="right")
        bars.set(ylabel="IoU, %")
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        train(sys.argv[2], sys.argv[3:])
    else:
        compare(__doc__, "camvid", CONFIG, RUNS, command, result_of, table, draw)
