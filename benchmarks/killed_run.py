#!/usr/bin/env python
"""Make the README's picture: one run without interruption, and the same run killed three times with SIGKILL.

    python benchmarks/killed_run.py [--data datasets/shapes] [--redraw]

Both runs train configs/quickstart.yaml on two ranks on the CPU. The second is killed, all ranks at once, as soon as its
metrics contain one of the KILLS, and started again with the same command. Written are docs/results/killed-run.json
(losses, kills and the SHA-256 of both final weights) and, from it, docs/images/killed-run.svg. --redraw makes only the
picture.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs/results/killed-run.json"
PICTURE = ROOT / "docs/images/killed-run.svg"
WORLD = 2
KILLS = (90, 190, 290)  # steps
SETTINGS = ("train.log_every=1", "checkpoint.every_steps=40")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: distinguishable by colour-blind readers


def start(data: str, output: Path) -> list[subprocess.Popen]:
    """Start the ranks of the run in `output`; their output goes to `output/rank_<n>.log`."""
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", "--output", str(output)]
    shared = {
        "WORLD_SIZE": WORLD,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
    }
    ranks = []
    for rank in range(WORLD):
        environment = os.environ | {
            key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()
        }
        with open(output / f"rank_{rank}.log", "a") as log:
            ranks.append(
                subprocess.Popen(
                    [*command, f"data.path={data}", *SETTINGS], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            )
    return ranks


def finish(ranks: list[subprocess.Popen], output: Path) -> None:
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}:\n{(output / 'rank_0.log').read_text()[-2000:]}")


def train_lines(output: Path) -> list[dict]:
    """Lines of kind "train" in metrics.jsonl, in the order written; an unfinished last line is left out."""
    path = output / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [line for line in map(json.loads, complete) if line["kind"] == "train"]


def kill_at(ranks: list[subprocess.Popen], output: Path, step: int) -> None:
    """Send SIGKILL to all ranks as soon as the metrics contain `step`."""
    while not any(line["step"] >= step for line in train_lines(output)):
        if any(rank.poll() is not None for rank in ranks):
            finish(ranks, output)
            raise SystemExit(f"the run ended before step {step}")
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def starts(output: Path) -> list[list[tuple[int, float]]]:
    """(step, loss) of every step, one list for each start of the run."""
    found: list[list[tuple[int, float]]] = []
    previous = float("inf")
    for line in train_lines(output):
        if line["step"] <= previous:
            found.append([])
        found[-1].append((line["step"], line["loss"]))
        previous = line["step"]
    return found


def measure(data: str, folder: Path) -> dict:
    """Run both and return their losses and the hashes of their final weights."""
    whole, killed = folder / "uninterrupted", folder / "killed"
    finish(start(data, whole), whole)
    for step in KILLS:
        kill_at(start(data, killed), killed, step)
    finish(start(data, killed), killed)
    hashes = {run.name: hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() for run in (whole, killed)}
    return {
        "command": "benchmarks/killed_run.py",
        "date": date.today().isoformat(),
        "versions": {"python": sys.version.split()[0], "torch": version("torch"), "deepspeed": version("deepspeed")},
        "world_size": WORLD,
        "settings": SETTINGS,
        "sha256": hashes,
        "uninterrupted": starts(whole)[0],
        "killed": starts(killed),
    }


def draw(result: dict) -> None:
    """Write the picture: both runs' losses over each other, a line at each kill, and both hashes."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "killed-run",  # the same result gives the same file
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.2, 4.2))
        axes = figure.add_axes((0.07, 0.27, 0.91, 0.66))
        axes.plot(*zip(*result["uninterrupted"], strict=True), color="#cccccc", linewidth=5, label="uninterrupted run")
        for number, part in enumerate(result["killed"]):
            axes.plot(
                *zip(*part, strict=True), color=COLOURS[number], linewidth=1.1, label=f"killed run, start {number + 1}"
            )
        top = max(loss for _, loss in result["uninterrupted"])
        for number, (part, after) in enumerate(zip(result["killed"], result["killed"][1:], strict=False)):
            step, resumed = part[-1][0], after[0][0] - 1
            axes.axvline(step, color=COLOURS[number], linestyle="--", linewidth=1.2)
            text = f"kill -9 at step {step}\nresumed from {resumed}"
            axes.text(step - 3, top, text, color=COLOURS[number], ha="right", va="top", fontsize=9)
        axes.set(xlabel="step", ylabel="training loss", xlim=(0, result["uninterrupted"][-1][0] + 2))
        axes.legend(loc=(0.8, 0.36), frameon=False, fontsize=9)
        whole, killed = result["sha256"]["uninterrupted"], result["sha256"]["killed"]
        if whole != killed:
            raise SystemExit(f"the final weights differ: {whole}, {killed}")
        figure.text(
            0.07, 0.085, f"SHA-256 of model.safetensors, uninterrupted  {whole}", family="DejaVu Sans Mono", fontsize=8
        )
        figure.text(
            0.07, 0.035, f"SHA-256 of model.safetensors, killed 3 times {killed}", family="DejaVu Sans Mono", fontsize=8
        )
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")


def main(arguments: argparse.Namespace) -> None:
    if not arguments.redraw:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(str(Path(arguments.data).resolve()), Path(folder))
        RESULT.write_text(json.dumps(result) + "\n")
    draw(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the README's picture of a run that is killed three times.")
    parser.add_argument(
        "--data", default="datasets/shapes", metavar="FOLDER", help="the drawn shapes (default: %(default)s)"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="make only the picture, from docs/results/killed-run.json"
    )
    main(parser.parse_args())
