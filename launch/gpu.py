#!/usr/bin/env python
"""Everything that only a GPU can show, in 8 minutes: python launch/gpu.py, or make gpu

Each part is a process of its own with a time limit, and leaves docs/results/gpu-<part>.json as it ends. What is only to be right runs
first, side by side; what is timed runs then, alone.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.cli import EXIT_CONFIG, EXIT_FAILED, Parser, fail

# What the parts import, by its name in a registry: the beginning of a wheel's.
NEEDED = {
    name: {"PIL": "pillow", "yaml": "pyyaml", "cpuinfo": "py-cpuinfo"}.get(name, name)
    for name in (
        *("torch", "triton", "torchvision", "timm", "einops", "numpy", "PIL", "safetensors", "fsspec", "tqdm", "tensorboard", "yaml"),
        *("deepspeed", "hjson", "ninja", "msgpack", "psutil", "cpuinfo", "webdataset", "braceexpand", "simplejpeg"),
        *("pydantic", "pydantic_core", "annotated_types", "typing_inspection"),
    )
}
CHECKERS = 8  # processes, most of whose time is Triton's compiling


@dataclass(frozen=True)
class Job:
    """What a part is given: a folder for its files, where its result goes, and whether this is a rehearsal on a CPU, with small sizes."""

    work: Path
    output: Path
    rehearsal: bool

    def size(self, on_gpu, rehearsed):
        return rehearsed if self.rehearsal else on_gpu

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"


# --- the parts: each returns its result, with `passed` in it --------------------------------------------------------------------------


def check(job: Job) -> dict:
    """Every kernel, forward and backward, against float64, on numbers drawn anew."""
    import multiprocessing

    seed, processes = random.SystemRandom().randrange(2**31), job.size(CHECKERS, 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = sum(pool.starmap(check_share, [(seed, number, processes) for number in range(processes)]), [])
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print("failed:", json.dumps(row))
    return {"passed": not failed, "says": f"{len(rows)} cases, {len(failed)} failed, seed {seed}", "seed": seed, "cases": rows}


def check_share(seed: int, number: int, of: int) -> list[dict]:
    import torch

    from catmodel.kernels.check import FEW, check, many

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = list(many()) if device.type == "cuda" else FEW
    return check(device, seed, cases[number::of])


def gradients(job: Job) -> dict:
    """Two steps from the same state give the same gradients, bit for bit."""
    import torch

    import catmodel

    device = torch.device(job.size("cuda", "cpu"))
    model = catmodel.create_model(job.size("cat_base", "cat_nano")).to(device, job.size(torch.bfloat16, torch.float32)).train()
    side, batch = model.img_size[0], job.size(64, 4)
    images = torch.randn(batch, 3, side, side, device=device, dtype=next(model.parameters()).dtype)

    def found() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # of dropout and drop-path
        model.zero_grad()
        model(images).float().square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    one, two = found(), found()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    return {"passed": not different, "says": f"{len(different)} of {len(one)} differ", "different": different}


def train(job: Job) -> dict:
    """Real training of a drawn dataset through launch/train.py; its first steps once more, killed without warning and started again."""
    steps, again = job.size((200, 100), (20, 12))
    whole, broken = job.work / "whole", job.work / "broken"
    run_training(job, whole, f"train.max_steps={steps}", "checkpoint.every_steps=100")
    short = f"train.max_steps={again}", job.size("checkpoint.every_steps=20", "checkpoint.every_steps=2")
    run_training(job, broken, *short, kill=True)
    run_training(job, broken, *short)
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


def run_training(job: Job, output: Path, *overrides: str, kill: bool = False) -> None:
    """launch/train.py on one device; with `kill`, by kill -9 as soon as there is a checkpoint."""
    settings = [
        f"data.path={job.dataset}",
        f"data.workers={min(12, len(os.sched_getaffinity(0)))}",
        *("train.epochs=40", "train.log_every=1", "train.evaluate_every=0", "monitor.images=0", "ema.decay=0.99", "zero.stage=1"),
        *("optimizer.lr=0.0005", "schedule.warmup_epochs=2", "augment.mixup=0", "augment.cutmix=0"),
        *job.size(("train.global_batch=128", "train.micro_batch=128"), ("train.global_batch=16", "train.micro_batch=16")),
        *job.size(
            ("train.precision=bf16", "train.compile=true"),
            ("train.precision=fp32", "train.compile=false", "model.name=cat_nano", "data.image_size=32"),
        ),
    ]
    command = [sys.executable, "launch/train.py", "--config", "configs/cat_t.yaml", "--output", str(output), *settings, *overrides]
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
    """Of all steps, in order; of steps that were taken twice, the second time's."""
    losses = {line["step"]: line["loss"] for line in lines_of(output) if line["kind"] == "train"}
    return [losses[step] for step in sorted(losses)]


def dali(job: Job) -> dict:
    """Some steps whose images nvJPEG decodes, where DALI is installed."""
    if job.rehearsal:
        return {"passed": True, "says": "not rehearsed: it needs a GPU"}
    if not installed("nvidia.dali"):
        return {"passed": True, "says": "not run: DALI is not installed here (it is too large to be carried along)"}
    output = job.work / "dali"
    run_training(job, output, "data.backend=dali", "data.device=gpu", "train.max_steps=10")
    return {"passed": len(losses_of(output)) == 10, "says": "10 steps", "losses": losses_of(output)}


def kernels(job: Job) -> dict:
    if job.rehearsal:
        return {"passed": True, "says": "not rehearsed: there is nothing to time"}
    result = bench(job, "kernels", "kernels")
    slower = [f"{r['name']} {r['stage']} {r['direction']}" for r in result["rows"] if r["way"] == "kernel" and r["speedup"] < 1]
    return {"says": f"slower than plain: {', '.join(slower) or 'none'}", **result}


def model(job: Job) -> dict:
    sizes = job.size(["--models", "cat_base", "--rounds", "5"], ["--models", "cat_nano", "--rounds", "1", "--steps", "1", "--batch", "2"])
    ways = job.size([], ["--ways", "ours,plain,released"])
    result = bench(job, "model", "model", *sizes, *ways, "--profile", str(job.work / "profile"))
    (name,) = result["models"]
    return {"says": "; ".join(said for mode, found in result["models"][name].items() for said in targets(mode, found["rows"])), **result}


def targets(mode: str, rows: dict[str, dict]) -> list[str]:
    """What the project aims at, and what came out, of the faster of our two ways."""
    ours = max((rows[way] for way in ("ours", "ours, compiled") if way in rows), key=lambda row: row["median"])
    said = [f"{mode}: {ours['ratio']:.2f} x released (aim 3), {ours['median'] / rows['plain']['median']:.2f} x plain (aim 2)"]
    bandwidth = rows["ours"]["of_floor"]
    said += [f"MFU {ours['mfu']:.0%} (aim 45 %), of the roofline's floor {bandwidth:.0%} (aim 60 %)"]
    if "swin_small_patch4_window7_224" in rows:
        swin = rows["swin_small_patch4_window7_224"]
        said += [f"per GFLOP {ours['per_gflop'] / swin['per_gflop']:.2f} x Swin-S (aim 1)"]
    return said


def layout(job: Job) -> dict:
    """CoTNet's convolutions, channels first and channels last."""
    sizes = job.size(["--rounds", "5"], ["--rounds", "1", "--steps", "1", "--batch", "2"])
    result = bench(job, "layout", "model", "--models", "cotnet50", "--ways", "ours,channels_last", *sizes)
    ratios = {mode: found["rows"]["ours, channels-last"]["ratio"] for mode, found in result["models"]["cotnet50"].items()}
    return {"says": "channels-last: " + ", ".join(f"{mode} {ratio:.2f} x" for mode, ratio in ratios.items()), **result}


def overhead(job: Job) -> dict:
    sizes = job.size(["--config", "configs/cat_b.yaml", "train.micro_batch=128", "train.global_batch=1024"], ["train.micro_batch=16"])
    result = bench(job, "overhead", "train", *sizes, *job.size([], ["--steps", "1", "--rounds", "1"]), f"data.path={job.dataset}")
    return {"says": f"DeepSpeed {result['overhead']:+.1%} of a bare step (aim: below 3 %)", **result}


def bench(job: Job, part: str, *arguments: str) -> dict:
    """launch/bench.py's result."""
    path = job.work / f"{part}.json"
    subprocess.run([sys.executable, "launch/bench.py", *arguments, "--json", str(path)], cwd=ROOT, check=True)
    return {"passed": True, **json.loads(path.read_text())}


# Parts that run together; and how long they may take, in seconds.
ROUNDS: tuple[tuple[int, tuple[Callable[[Job], dict], ...]], ...] = (
    (210, (check, train, gradients, dali)),
    (90, (kernels,)),
    (180, (model,)),
    (120, (overhead,)),
    (60, (layout,)),
)
PARTS = {part.__name__: part for _, parts in ROUNDS for part in parts}

# --- running them ----------------------------------------------------------------------------------------------------------------------


def main(arguments: argparse.Namespace) -> int:
    if arguments.part:
        return run_part(arguments.part, Job(Path(arguments.work), Path(arguments.output), arguments.rehearse))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), Path(arguments.output).resolve(), arguments.rehearse)
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if arguments.wheels:
            environment["PYTHONPATH"] = install(Path(arguments.wheels), job.work / "site")
            sys.path.insert(0, str(job.work / "site"))
        missing = sorted(package for name, package in NEEDED.items() if not installed(name))
        if missing:
            return fail(
                EXIT_CONFIG, f"{sys.executable} lacks {', '.join(missing)}: put their wheels into a folder, and give GPU_WHEELS=FOLDER"
            )
        import torch

        if not torch.cuda.is_available() and not job.rehearsal:
            return fail(EXIT_CONFIG, "this needs an NVIDIA GPU, and torch sees none; --rehearse runs it on the CPU, with small sizes")
        environment["DS_ACCELERATOR"] = job.size("cuda", "cpu")
        job.output.mkdir(parents=True, exist_ok=True)
        draw_dataset(job, environment)
        results = {}
        for limit, parts in ROUNDS:
            left = max(0, arguments.seconds - (time.monotonic() - began))
            limit = arguments.seconds if job.rehearsal else min(limit, left)
            results |= run_together([part.__name__ for part in parts], job, environment, limit)
    print(f"\n{'part':12}{'':8}{'seconds':>9}  ({time.monotonic() - began:.0f} s in all, {job.output}/gpu-*.json)")
    for name, result in results.items():
        print(f"{name:12}{'passed' if result['passed'] else 'FAILED':8}{result['seconds']:9.0f}  {result['says']}")
    return 0 if all(result["passed"] for result in results.values()) else EXIT_FAILED


def run_together(names: list[str], job: Job, environment: dict[str, str], limit: float) -> dict[str, dict]:
    """Results of the parts, each in a process; those that are not done after `limit` seconds are killed, and have failed."""
    began, running, results = time.monotonic(), {}, {}
    for name in names:
        command = [sys.executable, __file__, "--part", name, "--work", str(job.work), "--output", str(job.output)]
        command += ["--rehearse"] if job.rehearsal else []
        log = open(job.work / f"{name}.log", "w")
        interpreted = {"TRITON_INTERPRET": "1"} if job.rehearsal and name == "check" else {}
        running[name] = subprocess.Popen(
            command, cwd=ROOT, env={**environment, **interpreted}, stdout=log, stderr=log, start_new_session=True
        )
    for name, process in running.items():
        path, why = job.output / f"gpu-{name}.json", ""
        try:
            if process.wait(max(0.1, began + limit - time.monotonic())):
                why = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            why = f"not done after {limit:.0f} s"
        text = (job.work / f"{name}.log").read_text(errors="replace")
        print(f"\n--- {name}\n{text[-6000:]}", flush=True)
        if why:
            write(path, {"passed": False, "says": why}, time.monotonic() - began)
        results[name] = json.loads(path.read_text())
    return results


def run_part(name: str, job: Job) -> int:
    began = time.monotonic()
    write(job.output / f"gpu-{name}.json", PARTS[name](job), time.monotonic() - began)
    return 0


def write(path: Path, result: dict, seconds: float) -> None:
    import torch  # noqa: F401 (so that the machine's GPU is named)

    from launch.bench import machine, versions

    about = {"command": "launch/gpu.py", "date": date.today().isoformat(), "machine": machine(), **versions()}
    path.write_text(json.dumps({**result, **about, "seconds": seconds}, indent=1) + "\n")


def install(wheels: Path, site: Path) -> str:
    """Unpack the wheels into a folder of their own; returns PYTHONPATH with it in front."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of nvidia in nvidia.dali
        return False


def draw_dataset(job: Job, environment: dict[str, str]) -> None:
    images, size = job.work / "images", job.size("224", "32")
    count = job.size(("640", "20"), ("64", "10"))
    draw = ["examples/draw_dataset.py", str(images), "--train", count[0], "--val", count[1], "--size", size]
    for command in (draw, ["launch/prepare.py", str(images), str(job.dataset)]):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Kernels' correctness and speed, model and training on a GPU; one JSON file a part. Exit code 0: all parts passed.",
        epilog="A part has passed where it ran to its end and what it computed is right; speeds are reported beside what they should be.",
    )
    parser.add_argument("--output", default="docs/results", metavar="DIR", help="folder of the gpu-<part>.json (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=480, help="time for all of it (default: %(default)s)")
    parser.add_argument(
        "--wheels", default=os.environ.get("GPU_WHEELS"), metavar="FOLDER", help="wheels that this Python lacks (default: $GPU_WHEELS)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes: finds mistakes, measures nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
