"""Running the parts of launch/gpu.py: each job in a process with a time limit; rows are on disk when they are measured.

First the parts that are not timed run side by side, together with the compilation of all that the others need. Then the
others run one after the other. The process of the next job starts early, imports what it needs, and waits for its turn.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_parts import NEED_IMAGES, PARTS, compilations
from benchmarks.gpu_record import ROOT, Part, Record, Session, cores, installed
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
TIMED = 200  # seconds that the first round leaves to the timed parts, if both are asked for
TAIL = 2500  # characters of a failed job's output that are printed
DALI = (
    "DALI's GPU decoder was not run: it would take nvidia-dali-cuda130 (a wheel of 199 MB), which needs "
    "nvidia-nvimgcodec-cu13[all] and nvidia-libnvcomp-cu13, and a run with data.backend=dali data.device=gpu"
)


class CannotMeasure(Exception):
    """This machine or its Python lacks something that the parts need."""

    exit_code = exit_codes.BAD_CONFIG


@dataclass
class Job:
    """A job of a part in a process of its own. warming: it only compiles."""

    part: Part
    name: str
    warming: bool = False
    began: float = 0.0
    process: subprocess.Popen = field(init=False)
    log: Path = field(init=False)

    def __str__(self) -> str:
        return f"{self.part.name} / {self.name}{' (compiling)' if self.warming else ''}"

    def start(self, session: Session, environment: dict[str, str]) -> None:
        self.log = session.work / f"{self.part.name}-{self.name}-{self.warming}.log".replace(" ", "_")
        command = [sys.executable, "launch/gpu.py", "--job", self.part.name, self.name, "--work", str(session.work)]
        command += [*options(session), *(["--warm"] if self.warming else [])]
        if session.rehearsal and self.part.name in ("check", "kernels"):
            environment = {**environment, "TRITON_INTERPRET": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def go(self) -> None:
        """Its turn begins."""
        self.began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has failed already
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def wait(self, until: float, output: Path) -> str:
        """Wait for its end, and end it at the time `until`. Returns what went wrong, or ""."""
        limit, why = until - self.began, ""
        try:
            if self.process.wait(max(0.1, until - time.monotonic())):
                why = f"ended with {self.process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"not done after {limit:.0f} s"
        self.end()
        print(f"{time.monotonic() - self.began:6.1f} s  {self}{f': {why}' if why else ''}", flush=True)
        text = self.log.read_text(errors="replace")
        if why or '"failed"' in text:
            (output / f"gpu-{self.log.name}").write_text(text[-200_000:])
            print(text[-TAIL:], flush=True)
        return why

    def end(self) -> None:
        """End the process and those that it started, if they are still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()


def run(session: Session, names: Sequence[str], seconds: float, wheels: Path | None) -> bool:
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
        end = began + seconds
        first = end - min(TIMED, seconds / 2) if any(part.alone for part in parts) else end
        if session.rehearsal:
            first = end = began + 1e6
        together(session, environment, [part for part in parts if not part.alone], compilations(names), first)
        one_by_one(session, environment, [part for part in parts if part.alone], end)
    finally:
        if drawing:
            drawing.kill()
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
    return environment


def options(session: Session) -> list[str]:
    """The session as arguments of another process."""
    given = ["--output", str(session.output), "--cache", str(session.cache)]
    given += ["--images", str(session.images)] if session.images else []
    return [*given, *(["--rehearse"] if session.rehearsal else [])]


def draw(session: Session, environment: dict[str, str]) -> subprocess.Popen:
    """Begin to prepare the dataset; jobs that need it wait for it."""
    command = [sys.executable, "launch/gpu.py", "--draw", "--work", str(session.work), *options(session)]
    with open(session.work / "draw.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def together(
    session: Session,
    environment: dict[str, str],
    parts: list[Part],
    compiled: list[list[tuple[str, str]]],
    until: float,
) -> None:
    """Run all jobs of parts that are not timed, and compile for the others, side by side. A rehearsal takes turns.

    All are ended at `until`, the parts at their limit.
    """
    rows = [[Job(PARTS[part], job, warming=True) for part, job in row] for row in compiled]
    rows = [[Job(part, job)] for part in parts for job in part.jobs] + rows
    if not rows:
        return
    # Each job compiles in threads of its own; not all of them do so all the time.
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(cores(), 2 * cores() // len(rows))))}
    began = time.monotonic()

    def in_turn(row: list[Job]) -> None:
        for job in row:
            if job.warming and time.monotonic() > until:
                break
            job.start(session, environment | threads)
            job.go()
            why = job.wait(
                min(until, began + (1e6 if session.rehearsal or job.warming else job.part.limit)), session.output
            )
            if not job.warming:
                record(session, job.part).finish(job.name, why)

    for part in parts:
        record(session, part).begin(list(part.jobs))
    with ThreadPoolExecutor(1 if session.rehearsal else len(rows)) as pool:
        list(pool.map(in_turn, rows))


def one_by_one(session: Session, environment: dict[str, str], parts: list[Part], end: float) -> None:
    """Run the jobs of timed parts, each alone but for the imports of the next one."""
    jobs = [Job(part, name) for part in parts for name in part.jobs]
    deadlines: dict[str, float] = {}
    for number, job in enumerate(jobs):
        if time.monotonic() > end - 5:
            break
        if number == 0:
            job.start(session, environment)
        if job.part.name not in deadlines:
            deadlines[job.part.name] = end if session.rehearsal else min(end, time.monotonic() + job.part.limit)
            record(session, job.part).begin(list(job.part.jobs))
        job.go()
        if number + 1 < len(jobs):
            jobs[number + 1].start(session, environment)
        why = job.wait(deadlines[job.part.name], session.output)
        record(session, job.part).finish(job.name, why)
    for job in jobs:
        if hasattr(job, "process") and job.process.poll() is None:
            job.end()
    for part in parts:
        if part.name not in deadlines:
            record(session, part).begin(list(part.jobs))


def run_job(part: str, name: str, session: Session) -> None:
    """Run one job in this process, after a line on standard input says that its turn has come."""
    import timm  # noqa: F401 (whatever takes long to import)
    import torch  # noqa: F401

    from train.engine import runtime  # noqa: F401

    sys.stdin.readline()
    PARTS[part].jobs[name](session, record(session, PARTS[part]))


def record(session: Session, part: Part) -> Record:
    return Record(session.output / f"gpu-{part.name}.json", part.judge, f"launch/gpu.py --parts {part.name}")


def install(wheels: Path, site: Path) -> str:
    """Unpack the wheels into the folder `site`. Returns PYTHONPATH with it in front."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
