"""The parts of `make gpu`: each computes its result, with "passed" in it and "says", a sentence for the table."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
CHECKERS = 8  # processes; most of their time is spent compiling with Triton
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One call of launch/gpu.py. work: folder for temporary files; rehearsal: on the CPU, with small sizes."""

    work: Path
    output: Path
    rehearsal: bool

    def size(self, on_gpu: T, rehearsed: T) -> T:
        return rehearsed if self.rehearsal else on_gpu

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"


def check(session: Session) -> dict:
    """Every kernel, forward and backward, compared with float64 on new random numbers."""
    import multiprocessing

    seed, processes = random.SystemRandom().randrange(2**31), session.size(CHECKERS, 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = sum(pool.starmap(check_share, [(seed, number, processes) for number in range(processes)]), [])
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print("failed:", json.dumps(row))
    return {
        "passed": not failed,
        "says": f"{len(rows)} cases, {len(failed)} failed, seed {seed}",
        "seed": seed,
        "cases": rows,
    }


def check_share(seed: int, number: int, of: int) -> list[dict]:
    import torch

    from catmodel.kernels.check import FEW, check, many

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = list(many()) if device.type == "cuda" else FEW
    return check(device, seed, cases[number::of])


def gradients(session: Session) -> dict:
    """Two steps from the same state give bitwise equal gradients."""
    import torch

    import catmodel

    device = torch.device(session.size("cuda", "cpu"))
    model = (
        catmodel.create_model(session.size("cat_base", "cat_nano"))
        .to(device, session.size(torch.bfloat16, torch.float32))
        .train()
    )
    side, batch = model.img_size[0], session.size(64, 4)
    images = torch.randn(batch, 3, side, side, device=device, dtype=next(model.parameters()).dtype)

    def found() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # for dropout and drop-path
        model.zero_grad()
        model(images).float().square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    one, two = found(), found()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    return {"passed": not different, "says": f"{len(different)} of {len(one)} differ", "different": different}


def train(session: Session) -> dict:
    """Train on a drawn dataset; repeat the first steps in a run that is killed and resumed; compare the losses."""
    steps, again = session.size((200, 100), (20, 12))
    whole, broken = session.work / "whole", session.work / "broken"
    run_training(session, whole, f"train.max_steps={steps}", "checkpoint.every_steps=100")
    short = f"train.max_steps={again}", session.size("checkpoint.every_steps=20", "checkpoint.every_steps=2")
    run_training(session, broken, *short, kill=True)
    run_training(session, broken, *short)
    losses, resumed = losses_of(whole), losses_of(broken)
    resume = next(line for line in lines_of(broken) if line.get("event") == "resume")
    first, last = (sum(part) / len(part) for part in (losses[: steps // 10], losses[-(steps // 10) :]))
    exact, falls = losses[:again] == resumed, last < first
    rates = sorted(line["images_per_second"] for line in lines_of(whole) if line["kind"] == "train")
    return {
        "passed": exact and falls and len(losses) == steps,
        "says": f"{len(losses)} steps, loss {first:.3f} to {last:.3f}; killed, and resumed from step {resume['step']}: "
        f"the first {again} losses {'are equal' if exact else 'DIFFER'}",
        "images_per_second": rates[len(rates) // 2],
        "losses": losses,
        "losses_resumed": resumed,
    }


def run_training(session: Session, output: Path, *overrides: str, kill: bool = False) -> None:
    """Run launch/train.py on one device. kill: end it with kill -9 as soon as there is a checkpoint."""
    settings = [
        f"data.path={session.dataset}",
        f"data.workers={min(12, len(os.sched_getaffinity(0)))}",
        *(
            "train.epochs=40",
            "train.log_every=1",
            "train.evaluate_every=0",
            "monitor.images=0",
            "ema.decay=0.99",
            "zero.stage=1",
        ),
        *("optimizer.lr=0.0005", "schedule.warmup_epochs=2", "augment.mixup=0", "augment.cutmix=0"),
        *session.size(
            ("train.global_batch=128", "train.micro_batch=128"), ("train.global_batch=16", "train.micro_batch=16")
        ),
        *session.size(
            ("train.precision=bf16", "train.compile=true"),
            ("train.precision=fp32", "train.compile=false", "model.name=cat_nano", "data.image_size=32"),
        ),
    ]
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        "configs/cat_t.yaml",
        "--output",
        str(output),
        *settings,
        *overrides,
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    while kill and process.poll() is None and not any(line.get("event") == "checkpoint" for line in lines_of(output)):
        time.sleep(0.01)
    if kill:
        process.kill()
    if process.wait() != (-9 if kill else 0):
        raise RuntimeError(f"training ended with {process.returncode}")


def lines_of(output: Path) -> list[dict]:
    from train.telemetry.goodput import read_lines

    path = output / "metrics.jsonl"
    return list(read_lines(path)) if path.exists() else []


def losses_of(output: Path) -> list[float]:
    """The losses of all steps, in order. For a step that was computed twice, the second loss."""
    losses = {line["step"]: line["loss"] for line in lines_of(output) if line["kind"] == "train"}
    return [losses[step] for step in sorted(losses)]


def dali(session: Session) -> dict:
    """Train some steps with images decoded by nvJPEG, if DALI is installed."""
    if session.rehearsal:
        return {"passed": True, "says": "not rehearsed: it needs a GPU"}
    if not installed("nvidia.dali"):
        return {"passed": True, "says": "not run: DALI is not installed"}
    output = session.work / "dali"
    run_training(session, output, "data.backend=dali", "data.device=gpu", "train.max_steps=10")
    return {"passed": len(losses_of(output)) == 10, "says": "10 steps", "losses": losses_of(output)}


def kernels(session: Session) -> dict:
    """Speed of each kernel compared with plain PyTorch."""
    if session.rehearsal:
        return {"passed": True, "says": "not rehearsed: there is nothing to time"}
    result = bench(session, "kernels", "kernels")
    slower = [
        f"{r['name']} {r['stage']} {r['direction']}"
        for r in result["rows"]
        if r["way"] == "kernel" and r["speedup"] < 1
    ]
    return {"says": f"slower than plain: {', '.join(slower) or 'none'}", **result}


def model(session: Session) -> dict:
    """Speed of CAT-B compared with other implementations and with timm's models."""
    sizes = session.size(
        ["--models", "cat_base", "--rounds", "5"],
        ["--models", "cat_nano", "--rounds", "1", "--steps", "1", "--batch", "2"],
    )
    ways = session.size([], ["--ways", "ours,plain,released"])
    result = bench(session, "model", "model", *sizes, *ways, "--profile", str(session.work / "profile"))
    (name,) = result["models"]
    return {
        "says": "; ".join(
            said for mode, found in result["models"][name].items() for said in targets(mode, found["rows"])
        ),
        **result,
    }


def targets(mode: str, rows: dict[str, dict]) -> list[str]:
    """The measured speeds beside the project's aims, for the faster of eager and compiled."""
    ours = max((rows[way] for way in ("ours", "ours, compiled") if way in rows), key=lambda row: row["median"])
    of_plain = ours["median"] / rows["plain"]["median"]
    said = [f"{mode}: {ours['ratio']:.2f} x released (aim 3), {of_plain:.2f} x plain (aim 2)"]
    bandwidth = rows["ours"]["of_floor"]
    said += [f"MFU {ours['mfu']:.0%} (aim 45 %), of the roofline's floor {bandwidth:.0%} (aim 60 %)"]
    if "swin_small_patch4_window7_224" in rows:
        swin = rows["swin_small_patch4_window7_224"]
        said += [f"per GFLOP {ours['per_gflop'] / swin['per_gflop']:.2f} x Swin-S (aim 1)"]
    return said


def layout(session: Session) -> dict:
    """Speed of CoTNet with channels-last tensors compared with contiguous ones."""
    sizes = session.size(["--rounds", "5"], ["--rounds", "1", "--steps", "1", "--batch", "2"])
    result = bench(session, "layout", "model", "--models", "cotnet50", "--ways", "ours,channels_last", *sizes)
    ratios = {
        mode: found["rows"]["ours, channels-last"]["ratio"] for mode, found in result["models"]["cotnet50"].items()
    }
    return {"says": "channels-last: " + ", ".join(f"{mode} {ratio:.2f} x" for mode, ratio in ratios.items()), **result}


def overhead(session: Session) -> dict:
    """Speed of DeepSpeed's training steps compared with a bare PyTorch loop."""
    sizes = session.size(
        ["--config", "configs/cat_b.yaml", "train.micro_batch=128", "train.global_batch=1024"], ["train.micro_batch=16"]
    )
    result = bench(
        session,
        "overhead",
        "train",
        *sizes,
        *session.size([], ["--steps", "1", "--rounds", "1"]),
        f"data.path={session.dataset}",
    )
    return {"says": f"DeepSpeed {result['overhead']:+.1%} of a bare step (aim: below 3 %)", **result}


def bench(session: Session, part: str, *arguments: str) -> dict:
    """Run launch/bench.py and return its results."""
    path = session.work / f"{part}.json"
    subprocess.run([sys.executable, "launch/bench.py", *arguments, "--json", str(path)], cwd=ROOT, check=True)
    return {"passed": True, **json.loads(path.read_text())}


def draw_dataset(session: Session, environment: dict[str, str]) -> None:
    """Draw the dataset of the parts that train, and prepare it."""
    images, size = session.work / "images", session.size("224", "32")
    count = session.size(("640", "20"), ("64", "10"))
    draw = ["examples/draw_dataset.py", str(images), "--train", count[0], "--val", count[1], "--size", size]
    for command in (draw, ["launch/prepare.py", str(images), str(session.dataset)]):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def installed(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


# Time limits in seconds, and the parts that run concurrently under them. Parts that are timed run alone.
ROUNDS: tuple[tuple[int, tuple[Callable[[Session], dict], ...]], ...] = (
    (210, (check, train, gradients, dali)),
    (90, (kernels,)),
    (180, (model,)),
    (120, (overhead,)),
    (60, (layout,)),
)
PARTS = {part.__name__: part for _, parts in ROUNDS for part in parts}
