#!/usr/bin/env python
"""A page about a run, or several side by side: python launch/report.py runs/cat_b"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, check_output, run


def main(arguments: argparse.Namespace) -> None:
    from operate.report.run import names, read_reported_run
    from train.config import ConfigError

    output = Path(arguments.output)
    check_output("--output", output)
    runs = [read_reported_run(Path(folder)) for folder in arguments.runs]

    from operate.report.figures import figures
    from operate.report.page import page

    called = names(runs)
    plots = figures(runs, called)
    try:
        for plot in plots.values():
            output.with_name(f"{output.stem}-{plot.name}.png").write_bytes(plot.png)
        output.write_text(page(runs, called, plots, time.time()), "utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written ({error.strerror}): choose another --output") from error
    print(f"{output} ({', '.join(called)}); its plots: {output.stem}-*.png beside it")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Write one self-contained HTML page about a run or several: curves, speed, goodput, restarts, "
        "incidents, details of the newest evaluation, config, versions. A run may still go on.",
        epilog="exit codes: 0, 65 a run has not begun or its files are damaged, 78 bad arguments. See docs/report.md.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, e.g. runs/cat_b")
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: report.html; plots go beside it, as PNG"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
