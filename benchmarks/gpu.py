"""Running the parts of launch/gpu.py: each in a process with a time limit, which leaves gpu-<part>.json."""

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.gpu_parts import PARTS, ROOT, ROUNDS, Session, draw_dataset, installed
from train import exit_codes
from train.telemetry.formatting import table

# Modules that the parts import -> their names in a package registry, with which the file names of their wheels begin.
NEEDED = {
    name: {"PIL": "pillow", "yaml": "pyyaml", "cpuinfo": "py-cpuinfo"}.get(name, name)
    for name in (
        *("torch", "triton", "torchvision", "timm", "einops", "numpy", "PIL", "safetensors", "fsspec", "tqdm"),
        *("tensorboard", "yaml", "deepspeed", "hjson", "ninja", "msgpack", "psutil", "cpuinfo", "webdataset"),
        *("braceexpand", "simplejpeg", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"),
    )
}


class CannotMeasure(Exception):
    """This machine or its Python lacks something that the parts need."""

    exit_code = exit_codes.BAD_CONFIG


def run(session: Session, seconds: float, wheels: Path | None) -> bool:
    """Run all parts in at most about `seconds` and print a table. Returns whether all of them passed.

    wheels: a folder of wheels that are put in front of this Python's own packages. Raises CannotMeasure.
    """
    began = time.monotonic()
    environment = dict(os.environ, PYTHONUNBUFFERED="1", DS_ACCELERATOR=session.size("cuda", "cpu"))
    if wheels:
        site = session.work / "site"
        environment["PYTHONPATH"] = install(wheels, site)
        sys.path.insert(0, str(site))
    missing = sorted(package for name, package in NEEDED.items() if not installed(name))
    if missing:
        raise CannotMeasure(
            f"{sys.executable} lacks {', '.join(missing)}: put their wheels into a folder, and give GPU_WHEELS=FOLDER"
        )
    import torch

    if not torch.cuda.is_available() and not session.rehearsal:
        raise CannotMeasure(
            "this needs an NVIDIA GPU, and torch sees none; --rehearse runs it on the CPU, with small sizes"
        )
    session.output.mkdir(parents=True, exist_ok=True)
    draw_dataset(session, environment)
    results = {}
    for limit, parts in ROUNDS:
        left = max(0, seconds - (time.monotonic() - began))
        limit = seconds if session.rehearsal else min(limit, left)
        results |= run_together([part.__name__ for part in parts], session, environment, limit)
    print(f"\n{time.monotonic() - began:.0f} s in all; results: {session.output}/gpu-*.json")
    rows = [
        [name, "passed" if result["passed"] else "FAILED", f"{result['seconds']:.0f} s", result["says"]]
        for name, result in results.items()
    ]
    print(table(rows, align="<<><"))
    return all(result["passed"] for result in results.values())


def run_together(names: list[str], session: Session, environment: dict[str, str], limit: float) -> dict[str, dict]:
    """Run the parts concurrently, each in a process that is killed after `limit` seconds; return their results."""
    began, running, results = time.monotonic(), {}, {}
    for name in names:
        command = [sys.executable, "launch/gpu.py", "--part", name]
        command += ["--work", str(session.work), "--output", str(session.output)]
        command += ["--rehearse"] if session.rehearsal else []
        interpreted = {"TRITON_INTERPRET": "1"} if session.rehearsal and name == "check" else {}
        log = open(session.work / f"{name}.log", "w")
        running[name] = subprocess.Popen(
            command, cwd=ROOT, env={**environment, **interpreted}, stdout=log, stderr=log, start_new_session=True
        )
    for name, process in running.items():
        path, why = session.output / f"gpu-{name}.json", ""
        try:
            if process.wait(max(0.1, began + limit - time.monotonic())):
                why = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            why = f"not done after {limit:.0f} s"
        text = (session.work / f"{name}.log").read_text(errors="replace")
        print(f"\n--- {name}\n{text[-6000:]}", flush=True)
        if why:
            write(path, {"passed": False, "says": why}, time.monotonic() - began)
        results[name] = json.loads(path.read_text())
    return results


def run_part(name: str, session: Session) -> None:
    """Run one part in this process and write its result."""
    began = time.monotonic()
    write(session.output / f"gpu-{name}.json", PARTS[name](session), time.monotonic() - began)


def write(path: Path, result: dict, seconds: float) -> None:
    import torch  # noqa: F401 (machine() then names the GPU)

    from benchmarks.environment import machine, versions

    about = {"command": "launch/gpu.py", "date": date.today().isoformat(), "machine": machine(), **versions()}
    path.write_text(json.dumps({**result, **about, "seconds": seconds}, indent=1) + "\n")


def install(wheels: Path, site: Path) -> str:
    """Unpack the wheels into the folder `site`. Returns PYTHONPATH with it in front."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
