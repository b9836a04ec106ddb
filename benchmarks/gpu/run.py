"""Running the parts of launch/gpu.py: the environment of their jobs (jobs.py), and what is said at the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.jobs import options, record, run_jobs
from benchmarks.gpu.parts import NEED_IMAGES, PARTS
from benchmarks.gpu.record import ROOT, Session, cores, installed
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
DALI = (
    "DALI's GPU decoder was not run: it would take nvidia-dali-cuda130 (a wheel of 199 MB), which needs "
    "nvidia-nvimgcodec-cu13[all] and nvidia-libnvcomp-cu13, and a run with data.backend=dali data.device=gpu"
)


class CannotMeasure(Exception):
    """This machine or its Python lacks something that the parts need."""

    exit_code = exit_codes.BAD_CONFIG


def run_parts(session: Session, names: Sequence[str], seconds: float, wheels: Path | None) -> bool:
    """Run parts in at most about `seconds` and print a table. Returns whether all of them passed.

    wheels: a folder of wheels that are put in front of this Python's own packages. Raises CannotMeasure.
    """
    began = time.monotonic()
    environment = environment_of(session, wheels)
    import torch

    if not torch.cuda.is_available() and not session.rehearsal:
        raise CannotMeasure(
            "this needs an NVIDIA GPU, and torch sees none; --rehearse runs it on the CPU, with small sizes"
        )
    session.output.mkdir(parents=True, exist_ok=True)
    session.cache.mkdir(parents=True, exist_ok=True)
    parts = [PARTS[name] for name in names]
    drawing = draw(session, environment) if set(names) & set(NEED_IMAGES) else None
    try:
        run_jobs(
            session,
            environment,
            parts,
            began + (1e6 if session.rehearsal else seconds),
            places=1 if session.rehearsal else places(torch.cuda.mem_get_info()[1]),
            preparing=lambda: drawing is not None and drawing.poll() is None,
        )
    finally:
        if drawing:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(drawing.pid, signal.SIGKILL)
            drawing.wait()
    results = {part.name: record(session, part).read() for part in parts}
    print(f"\n{time.monotonic() - began:.0f} s in all; results: gpu-*.json")
    rows = [
        [name, "passed" if result["passed"] else "FAILED", f"{result['seconds']:.0f} s", result["says"]]
        for name, result in results.items()
    ]
    print(table(rows, align="<<><"))
    if not installed("nvidia.dali"):
        print(DALI)
    return all(result["passed"] for result in results.values())


def environment_of(session: Session, wheels: Path | None) -> dict[str, str]:
    """The environment of all jobs. Raises CannotMeasure if a package is missing."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1", DS_ACCELERATOR=session.size("cuda", "cpu"))
    # What one process has compiled, the others find here, and so do later calls.
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(session.cache / "inductor")}
    environment |= {"TRITON_CACHE_DIR": str(session.cache / "triton")}
    if wheels:
        site = session.work / "site"
        environment["PYTHONPATH"] = install(wheels, site)
        sys.path.insert(0, str(site))
    missing = sorted(package for name, package in NEEDED.items() if not installed(name))
    if missing:
        raise CannotMeasure(
            f"{sys.executable} lacks {', '.join(missing)}: put their wheels into a folder, and give GPU_WHEELS=FOLDER"
        )
    from data_pipeline.native import LIBRARY

    if LIBRARY is None:  # the parts that read JPEGs would measure another decoder, at half its speed
        raise CannotMeasure(
            f"{sys.executable} finds no compiled decoder: run setup.py build_ext --inplace with this version of Python"
        )
    return environment


def draw(session: Session, environment: dict[str, str]) -> subprocess.Popen:
    """Begin to prepare the dataset; jobs that need it wait for it."""
    command = [sys.executable, "launch/gpu.py", "--draw", "--work", str(session.work), *options(session)]
    with open(session.work / "draw.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def places(memory: int) -> int:
    """How many jobs may run side by side: three cores and 27 GB of the device's `memory` (in bytes) for each.

    A step of CAT-B at batch 256 reserves 27 GB, also while its job waits for its turn.
    """
    return max(1, min(cores() // 3, int(memory / 27e9)))


def run_job(part: str, name: str, session: Session) -> None:
    """Run one job in this process."""
    PARTS[part].jobs[name](session, record(session, PARTS[part]))


def install(wheels: Path, site: Path) -> str:
    """Unpack the wheels into the folder `site`. Returns PYTHONPATH with it in front."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
