"""Whole runs of launch/train.py on one device: parts `train` and `whole` of `make gpu`."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.gpu.parts import OURS
from benchmarks.gpu.record import ROOT, Record, Session, cores

STEPS, EVERY = 240, 40  # of the runs that are compared; a checkpoint is written every so many
RECIPES = {"cat": "configs/cat_t.yaml", "pvt": "configs/pvt_tiny.yaml", "cotnet": "configs/cotnet50.yaml"}
WARM_UP = 10  # steps that are left out of speeds: compilation, and the capture of CUDA graphs


def compare(session: Session, record: Record, family: str) -> None:
    """The job of a family: a run, the same killed and resumed, and the same without graphs; where do losses differ?"""
    steps, every = session.size((STEPS, EVERY), (20, 4))
    folder = session.work / f"train-{family}"
    settings = [
        *(f"train.max_steps={steps}", f"checkpoint.every_steps={every}", "train.epochs=300", "train.log_every=1"),
        *session.size(
            ("train.global_batch=64", "train.micro_batch=64", "train.compile=true"),
            ("train.global_batch=4", "train.micro_batch=4", "train.precision=fp32", "train.compile=false"),
        ),
        *session.size((), ("data.image_size=32",)),
        *session.size((), ("model.name=cat_nano",) if family == "cat" else ()),
    ]
    replayed = [*settings, f"train.cuda_graphs={session.size('true', 'false')}"]

    def whole() -> dict:
        run(session, RECIPES[family], folder / "whole", replayed)
        return {"losses": losses_of(folder / "whole"), "weights": digest(folder / "whole")}

    def killed() -> dict:
        at = run(session, RECIPES[family], folder / "killed", replayed, kill=True)
        run(session, RECIPES[family], folder / "killed", replayed)
        resumed = next(line["step"] for line in lines_of(folder / "killed") if line.get("event") == "resume")
        first = losses_of(folder / "killed", first=True)
        weights = digest(folder / "killed")
        return {"losses": losses_of(folder / "killed"), "before": first, "weights": weights, "killed_at": at} | {
            "resumed_from": resumed
        }

    def without() -> dict:
        run(session, RECIPES[family], folder / "without", [*settings, "train.cuda_graphs=false"])
        return {"losses": losses_of(folder / "without"), "weights": digest(folder / "without")}

    record.measure(f"{family}, whole", whole, family=family, run="whole")  # alone: it compiles for the others
    others = {"killed and resumed": killed, "without graphs": without}
    with ThreadPoolExecutor(session.size(2, 1)) as pool:
        for name, work in others.items():
            pool.submit(record.measure, f"{family}, {name}", work, family=family, run=name)


def judge(rows: list[dict]) -> tuple[bool, str]:
    """Says at which step each run's losses first differ from the whole run's, and whether the weights do."""
    said, equal = [], True
    for family in dict.fromkeys(row["family"] for row in rows):
        runs = {row["run"]: row for row in rows if row["family"] == family}
        whole, found = runs["whole"], []
        for name, row in runs.items():
            if name == "whole":
                continue
            step = first_difference(whole["losses"], row["losses"])
            same = step is None and row["weights"] == whole["weights"]
            equal &= same
            where = (
                f" (killed after {row['killed_at']}, resumed from {row['resumed_from']})" if "killed_at" in row else ""
            )
            what = "equal" if same else f"DIFFERS from step {step} on" if step else "other WEIGHTS"
            before = row.get("before", [])  # what was lost by the kill, and taken again
            if early := first_difference(whole["losses"][: len(before)], before):
                what, equal = f"DIFFERS before the kill from step {early} on", False
            found.append(f"{name}{where} {what}")
        said.append(f"{family}, {len(whole['losses'])} steps: {', '.join(found)}")
    return equal and bool(rows), "; ".join(said)


def first_difference(one: Sequence[float], other: Sequence[float]) -> int | None:
    """The first step, counted from 1, whose losses differ or which one of the two lacks."""
    pairs = zip([*one, None], [*other, None], strict=False)
    step = next((step for step, (a, b) in enumerate(pairs, 1) if a != b), None)
    return step if step or len(one) == len(other) else min(len(one), len(other)) + 1


def whole(session: Session, record: Record) -> None:
    """CAT-B's recipe from full-size JPEGs: images/s, the share of the model's own speed, and the wait for data.

    When the run is compiled it is stopped until this job's turn.
    """
    steps, batch = session.size((120, 256), (20, 4))
    settings = [
        *(f"train.global_batch={batch}", f"train.micro_batch={batch}", "train.epochs=300", "train.log_every=5"),
        *session.size((), ("model.name=cat_nano", "data.image_size=32", "train.precision=fp32", "train.compile=false")),
    ]
    output = session.work / "whole"

    def measure() -> dict:
        process = start(session, "configs/cat_b.yaml", output, [*settings, f"train.max_steps={steps}"])
        while process.poll() is None and last_step(output) < session.size(WARM_UP, 1):
            time.sleep(0.005)
        try:
            process.send_signal(signal.SIGSTOP)
            session.turn()
            paused = last_step(output)
            process.send_signal(signal.SIGCONT)
            if process.wait():
                raise RuntimeError(f"the run ended with {process.returncode}")
        finally:
            process.kill()  # if there was no turn
        lines, warm_up = lines_of(output), paused + session.size(2 * 5, 5)  # two lines of log: the pause is in one
        row = speeds(lines, warm_up)
        lines = [line for line in lines if line["kind"] != "train" or line["step"] == 1 or line["step"] > warm_up]
        path = session.output / f"train-cat_b-batch{batch}-default-metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return row | {"share": share(session.output, row["images_per_second"], batch)}

    record.measure("cat_b", measure, batch=batch, steps=steps, cores=cores())


def speeds(lines: list[dict], warm_up: int) -> dict:
    """A run's speed after `warm_up` steps, and what its start and its last save cost."""
    steps = [line for line in lines if line["kind"] == "train"]
    warm = [line for line in steps if line["step"] > warm_up]
    rates = [line["images_per_second"] for line in warm]
    start, save = (next(line for line in lines if line.get("event") == event) for event in ("start", "checkpoint"))
    return {
        "images_per_second": median(rates),
        "min": min(rates),
        "max": max(rates),
        "step_ms": median(line["step_ms"] for line in warm),
        "data_wait": median(line["data_wait"] for line in warm),
        "startup_seconds": start["startup_seconds"],
        "first_step_seconds": steps[0]["step_ms"] / 1000,
        "last_save_seconds": save["stall_seconds"],
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
    }


def share(output: Path, speed: float, batch: int) -> float | None:
    """`speed` as a share of the engine's that the part `model` measured at the same batch; None without that."""
    path = output / "gpu-model.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = {"model": OURS, "way": "engine", "batch": batch}
    own = [row["images_per_second"] for row in rows if key.items() <= row.items() and "failed" not in row]
    return speed / own[0] if own else None


def judge_whole(rows: list[dict]) -> tuple[bool, str]:
    (row,) = rows
    said = f"{row['images_per_second']:,.0f} images/s ({row['min']:,.0f} to {row['max']:,.0f}), batch {row['batch']}, "
    said += f"data wait {row['data_wait']:.1%} on {row['cores']} cores"
    if row["share"]:
        said += f", {row['share']:.0%} of a step's own speed (aim 97 %)"
    return True, said


def start(session: Session, config: str, output: Path, settings: Sequence[str]) -> subprocess.Popen:
    """Start launch/train.py."""
    dataset = session.wait_for_dataset()
    common = [f"data.path={dataset}", f"data.workers={min(16, cores())}", "train.evaluate_every=0", "monitor.images=0"]
    command = [sys.executable, "launch/train.py", "--config", config, "--output", str(output), *common, *settings]
    return subprocess.Popen(command, cwd=ROOT)


def run(session: Session, config: str, output: Path, settings: Sequence[str], kill: bool = False) -> int | None:
    """Run launch/train.py. kill: end it with kill -9 when it has written a checkpoint, and return its last step."""
    process = start(session, config, output, settings)
    while kill and process.poll() is None:
        if any(line.get("event") == "checkpoint" for line in lines_of(output)):
            process.kill()
        time.sleep(0.005)
    if process.wait() != (-9 if kill else 0):
        raise RuntimeError(f"{output.name} ended with {process.returncode}")
    return last_step(output) if kill else None


def last_step(output: Path) -> int:
    return max((line["step"] for line in lines_of(output) if line["kind"] == "train"), default=0)


def lines_of(output: Path) -> list[dict]:
    from train.telemetry.goodput import read_lines

    path = output / "metrics.jsonl"
    return list(read_lines(path)) if path.exists() else []


def losses_of(output: Path, first: bool = False) -> list[float]:
    """The losses of all steps, in order. Of a step that was computed twice: the second loss, or the first one."""
    losses: dict[int, float] = {}
    for line in lines_of(output):
        if line["kind"] == "train" and not (first and line["step"] in losses):
            losses[line["step"]] = line["loss"]
    return [losses[step] for step in sorted(losses)]


def digest(output: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
