#!/usr/bin/env python
"""Train BCCD from scratch on the CPU: configs/bccd.yaml beside torchvision's RetinaNet with a ResNet-18 FPN.

    python benchmarks/bccd.py DATASET [--output runs/bccd] [--epochs N]
    python benchmarks/bccd.py --table

torchvision's network is trained by torchvision's own recipe (torchvision_retinanet.py). Both see the same number of
images, of the same size, with anchors of the same sides, and each is trained with three learning rates. CAT's scores
are those of its EMA. A run has one core, and as many runs are trained at a time as there are cores. Runs that are
finished are not repeated: give another folder for other settings. Written are docs/results/bccd.json and, from it,
docs/images/bccd.png; --table makes only the picture and prints the table.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.side_by_side import Run, compare, draw_curves

CONFIG = ROOT / "configs/bccd.yaml"
CPU_SECONDS = "cpu_seconds.json"  # a file of each run's folder
NAMES = {"cat": "CAT, RetinaNet", "torchvision": "torchvision's RetinaNet, ResNet-18"}

RUNS = [
    *(Run("torchvision", "sgd", rate) for rate in (1e-3, 2.5e-3, 5e-3)),
    *(Run("cat", "muon", rate) for rate in (1e-3, 2e-3, 4e-3)),
]


def settings(run: Run, options: argparse.Namespace) -> list[str]:
    """The config's overrides; torchvision's run takes data, number of epochs and sizes from them."""
    found = [f"data.path={options.dataset}"] + [f"train.epochs={options.epochs}"] * bool(options.epochs)
    return found + [f"optimizer.name={run.optimizer}", f"optimizer.lr={run.rate}"] * (run.model == "cat")


def command(run: Run, options: argparse.Namespace) -> list[str]:
    """The program that trains one run to its end."""
    train = [sys.executable, str(Path(__file__)), "--run", run.model, str(run.rate), str(options.output / run.name)]
    return [*train, *settings(run, options)]


def train(model: str, rate: float, output: Path, overrides: list[str]) -> None:
    """Train one run to its end, in a process of its own. It goes on from where an earlier process was interrupted."""
    output.mkdir(parents=True, exist_ok=True)
    spent = float((output / CPU_SECONDS).read_text()) if (output / CPU_SECONDS).exists() else 0.0
    try:
        if model == "cat":
            from train import run

            run(CONFIG, overrides, output=output)
        elif not (output / "evaluations.json").exists():
            from benchmarks import torchvision_retinanet
            from train.config import load_config

            config = load_config(CONFIG, overrides)
            sizes = dict(epochs=config.train.epochs, batch=config.train.global_batch, every=config.train.evaluate_every)
            geometry = dict(scale=config.task.scales[-1], anchor_scale=config.task.anchor_scale)
            torchvision_retinanet.train(Path(config.data.path), output / "evaluations.json", rate, **sizes, **geometry)
    finally:
        (output / CPU_SECONDS).write_text(f"{spent + sum(os.times()[:4]):.0f}\n")


def result_of(run: Run, options: argparse.Namespace) -> dict:
    """What came out of a run. cpu_seconds: of its process and its data workers."""
    output = options.output / run.name
    if run.model == "cat":
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found = [line for line in lines if line["kind"] == "eval" and line["weights"] == "ema"]
    else:
        found = json.loads((output / "evaluations.json").read_text())
    final = max(found, key=lambda line: line["step"])
    return {
        **run._asdict(),
        "settings": settings(run, options),
        "cpu_seconds": json.loads((output / CPU_SECONDS).read_text()),
        **{name: final[name] for name in ("ap", "ap50", "ap75")},
        "evaluations": found,
    }


def table(result: dict) -> str:
    from benchmarks.markdown import markdown

    rows = [
        [
            *(run["model"], run["optimizer"], f"{run['rate']:g}"),
            *(f"{run[name]:.1f}" for name in ("ap", "ap50", "ap75")),
            f"{run['cpu_seconds'] / 60:.0f}",
        ]
        for run in result["runs"]
    ]
    return markdown(["network", "optimizer", "learning rate", "AP", "AP50", "AP75", "CPU minutes"], rows)


def draw(result: dict, path: Path) -> None:
    """AP and AP50 against the images seen, of all runs."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, score, label in zip(figure.subplots(1, 2), ("ap", "ap50"), ("AP", "AP50"), strict=True):
            draw_curves(axes, result, NAMES, score, f"{label} on val, %", "ap")
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        train(sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
    else:
        compare(__doc__, "bccd", CONFIG, RUNS, command, result_of, table, draw)
