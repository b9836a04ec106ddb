"""For comparisons of networks: several learning rates each, every run on one core, and their curves in one picture."""

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#0072B2", "#D55E00")


class Run(NamedTuple):
    model: str
    optimizer: str
    rate: float

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.model}-{self.optimizer}-{self.rate:g}"


def compare(
    description: str,
    program: str,
    config: Path,
    runs: Sequence[Run],
    command: Callable[[Run, argparse.Namespace], list[str]],
    result_of: Callable[[Run, argparse.Namespace], dict],
    table: Callable[[dict], str],
    draw: Callable[[dict, Path], None],
) -> None:
    """The program benchmarks/<program>.py, which the `description` describes.

    config: of the task. command: trains one run. result_of: what came out of it. table, draw: print and draw a result.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", metavar="DATASET", help="the dataset, prepared by launch/prepare.py")
    parser.add_argument("--output", type=Path, default=Path("runs") / program, metavar="FOLDER")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--table", action="store_true", help="print the table and draw the picture again")
    options = parser.parse_args()
    if not options.table and not options.dataset:
        parser.error("DATASET is missing")
    path = ROOT / f"docs/results/{program}.json"
    if not options.table:
        from benchmarks.environment import machine, versions
        from train.config import load_config

        finished = {run for run in runs if (options.output / run.name / "model.safetensors").exists()}
        run_on_cores(command(run, options) for run in runs if run not in finished)
        result = {
            "command": f"benchmarks/{program}.py",
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "global_batch": load_config(config, [f"data.path={options.dataset}"]).train.global_batch,
            "runs": [result_of(run, options) for run in runs],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(path.read_text())
    draw(result, ROOT / f"docs/images/{program}.png")
    print(table(result))


def run_on_cores(commands: Iterable[Sequence[str]]) -> None:
    """Run all `commands` to their ends, in the repository's root. Raises SystemExit if one fails."""
    cores: SimpleQueue[int] = SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def run(command: Sequence[str]) -> None:
        core = cores.get()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(["taskset", "-c", str(core), *command], cwd=ROOT, env=environment)
        cores.put(core)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")

    with ThreadPoolExecutor(cores.qsize()) as executor:
        list(executor.map(run, commands))


def best(runs: Iterable[dict], score: str) -> dict[str, dict]:
    """The run of each model with the highest score at its end."""
    found: dict[str, dict] = {}
    for run in runs:
        if run[score] > found.get(run["model"], {}).get(score, -1):
            found[run["model"]] = run
    return found


def draw_curves(axes: "Axes", result: dict, names: dict[str, str], score: str, label: str, chosen: str) -> None:
    """A score against the images seen, of all runs of a result. Of each model the best run, by the score `chosen`, is
    drawn stronger.

    names: of the models, for the legend.
    """
    strongest = best(result["runs"], chosen)
    for run in result["runs"]:
        by_step: dict[int, float] = {}
        for line in run["evaluations"]:  # of the weights and of their EMA
            by_step[line["step"]] = max(line[score], by_step.get(line["step"], 0.0))
        is_best = run is strongest[run["model"]]
        axes.plot(
            [step * result["global_batch"] / 1000 for step in by_step],
            list(by_step.values()),
            marker=".",
            color=COLOURS[list(names).index(run["model"])],
            alpha=1 if is_best else 0.3,
            label=names[run["model"]] if is_best else None,
        )
    axes.set(xlabel="thousand images seen", ylabel=label, ylim=(0, None))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # above, where no curve is
