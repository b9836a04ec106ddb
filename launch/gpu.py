#!/usr/bin/env python
"""Measure on a GPU what only a GPU can show, in 7 minutes: python launch/gpu.py, or make gpu"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.parts import CALLS, CIFAR, PARTS
from benchmarks.gpu.record import Session
from benchmarks.gpu.run import CannotMeasure, run_job, run_parts
from launch.cli import Parser, leave, run
from train import exit_codes


def main(arguments: argparse.Namespace) -> None:
    if arguments.work:  # a process that another one of this command has started
        work(arguments, Path(arguments.work))
        return
    names = [part for name in arguments.parts.split(",") for part in CALLS.get(name, [name])]
    if unknown := set(names) - set(PARTS):
        raise CannotMeasure(f"--parts {','.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    if set(names) & set(CIFAR) and not arguments.cifar:
        raise CannotMeasure(f"--parts {arguments.parts}: add --cifar DATASET, CIFAR-10 prepared by launch/prepare.py")
    wheels = Path(arguments.wheels) if arguments.wheels else None
    with tempfile.TemporaryDirectory() as folder:
        passed = run_parts(session_of(arguments, Path(folder)), names, arguments.seconds, wheels)
    if not passed:
        sys.exit(exit_codes.FAILED)


def work(arguments: argparse.Namespace, folder: Path) -> None:
    session = session_of(arguments, folder)
    if arguments.draw:
        from benchmarks.gpu.small import draw

        draw(session)
    else:
        run_job(*arguments.job, session)


def session_of(arguments: argparse.Namespace, folder: Path) -> Session:
    images, cifar = (Path(path).resolve() if path else None for path in (arguments.images, arguments.cifar))
    output, cache = Path(arguments.output).resolve(), Path(arguments.cache).resolve()
    return Session(folder, output, cache, images, cifar, arguments.rehearse)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Check the kernels, and measure kernels, models and training on a GPU; one JSON file per part.",
        epilog="parts: "
        + "; ".join(f"{call}: {', '.join(names)}" for call, names in CALLS.items())
        + "; and those given by name alone: "
        + ", ".join(name for name in PARTS if name not in sum(CALLS.values(), []))
        + ". Exit codes: 0 all parts passed, 70 a part failed, 78 bad "
        "arguments or no GPU. A part passes if it ran to its end and its results are correct; speeds are "
        "reported beside the project's aims.",
    )
    parser.add_argument(
        "--output", default="docs/results", metavar="DIR", help="folder of the gpu-<part>.json (default: %(default)s)"
    )
    parser.add_argument(
        "--parts", default="speed", metavar="A,B", help="speed, bits, and names of parts (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=420, help="time limit for all parts (default: %(default)s)")
    parser.add_argument(
        "--images", metavar="FOLDER", help="photographs to train on, *.jpg in folders of classes (default: drawn ones)"
    )
    parser.add_argument(
        "--cifar",
        metavar="DATASET",
        help=f"CIFAR-10, prepared by launch/prepare.py, for parts {' and '.join(CIFAR)}: whole runs of these configs",
    )
    parser.add_argument(
        "--cache",
        default=os.path.join(tempfile.gettempdir(), "gpu-cache"),
        metavar="DIR",
        help="what was compiled and drawn, for later calls on the same machine (default: %(default)s)",
    )
    parser.add_argument(
        "--wheels",
        default=os.environ.get("GPU_WHEELS"),
        metavar="FOLDER",
        help="wheels of packages that this Python lacks (default: $GPU_WHEELS)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run on the CPU, with small sizes: to find mistakes, not to measure"
    )
    for hidden in ("--work", "--draw", "--job"):
        kind = {"--work": {}, "--job": {"nargs": 2}}.get(hidden, {"action": "store_true"})
        parser.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    return parser.parse_args()


if __name__ == "__main__":
    leave(run(main, parse_arguments()))  # at once: NCCL's threads may wait for a device that failed
