#!/usr/bin/env python
"""Where a run's time went, over all its starts: python launch/goodput.py runs/cat_b"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, run
from train.telemetry.formatting import clock, counted
from train.telemetry.goodput import Start, goodput


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.split import DataError
    from operate.run_folder import last_beat, read_log
    from train.config import ConfigError

    folder = Path(arguments.run)
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a run's folder")
    try:
        log = read_log(folder)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give the folder of a run that has started"
        ) from error
    ledger = log.ledger
    split = ledger.split(last_beat(folder))
    if not split:
        why = "the run has not begun, or was made before lines had times, and must be run anew"
        raise DataError(f"{path} has no start with a time: {why}")
    summary = {
        "run": str(folder),
        "goodput": goodput(split),
        "total": sum(split.values()),
        "seconds": split,
        "restarts": len(ledger.starts) - 1,
        "lost_steps": ledger.lost_steps,
        "lines_left_out": ledger.left_out,
        "starts": [about(start, end) for start, end in zip(ledger.starts, log.endings(folder), strict=True)],
    }
    print(json.dumps(summary)) if arguments.json else show(summary)


def about(start: Start, end: str | None) -> dict:
    """One start for the table."""
    steps = {"first_step": start.step, "last_step": start.last_step}
    return {"time": start.began, "world_size": start.world_size, **steps, "end": end}


def show(summary: dict) -> None:
    print(f"{summary['run']}: {summary['goodput']:.1%} of {hms(summary['total'])} was productive")
    print(f"{counted(summary['restarts'], 'restart')}, {counted(summary['lost_steps'], 'step')} lost")
    if summary["lines_left_out"]:
        print(f"left out: {summary['lines_left_out']} lines from before the first start that has a time")
    print(f"\n{'category':<18}{'time':>12}{'percent':>10}")
    for category, seconds in summary["seconds"].items():
        print(f"{category.replace('_', ' '):<18}{hms(seconds):>12}{100 * seconds / (summary['total'] or 1):>10.1f}")
    print(f"\n{'start':<7}{'when':<21}{'ranks':>5}{'steps':>20}   end")
    for number, start in enumerate(summary["starts"], 1):
        steps = f"{start['first_step']} to {start['last_step']}"
        ranks = start["world_size"] or "?"
        end = start["end"] or "none yet: it runs, or was killed"
        print(f"{number:<7}{clock(start['time']):<21}{ranks:>5}{steps:>20}   {end}")


def hms(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Where a run's time went, over all its starts, and how each start ended. The run may still go on.",
        epilog="exit codes: 0, 65 the run's metrics cannot be used, 78 bad arguments. "
        "train/telemetry/goodput.py describes how each category is measured.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, e.g. runs/cat_b")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, times in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
