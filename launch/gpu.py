#!/usr/bin/env python
"""Measure on a GPU what only a GPU can show, in 8 minutes: python launch/gpu.py, or make gpu"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import gpu
from benchmarks.gpu_parts import PARTS, Session
from launch.cli import Parser, run
from train import exit_codes


def main(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output).resolve()
    if arguments.part:
        gpu.run_part(arguments.part, Session(Path(arguments.work), output, arguments.rehearse))
        return
    wheels = Path(arguments.wheels) if arguments.wheels else None
    with tempfile.TemporaryDirectory() as work:
        passed = gpu.run(Session(Path(work), output, arguments.rehearse), arguments.seconds, wheels)
    if not passed:
        sys.exit(exit_codes.FAILED)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Check the kernels, and measure kernels, models and training on a GPU; one JSON file per part.",
        epilog="exit codes: 0 all parts passed, 70 a part failed, 78 bad arguments or no GPU. A part passes if it ran "
        "to its end and its results are correct; speeds are reported beside the project's aims.",
    )
    parser.add_argument(
        "--output", default="docs/results", metavar="DIR", help="folder of the gpu-<part>.json (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=480, help="time limit for all parts (default: %(default)s)")
    parser.add_argument(
        "--wheels",
        default=os.environ.get("GPU_WHEELS"),
        metavar="FOLDER",
        help="wheels of packages that this Python lacks (default: $GPU_WHEELS)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run on the CPU, with small sizes: to find mistakes, not to measure"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
