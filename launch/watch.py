#!/usr/bin/env python
"""Watch a run in a terminal, from any node that sees its folder: python launch/watch.py runs/cat_b"""

import argparse
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, run
from operate.run_folder import NO_RUN, amount, quantity
from operate.watch import FINAL, Progress, Status, Watched
from train.config import ConfigError
from train.telemetry.formatting import clock, counted, duration, rate

TURN = 2.0  # seconds between two looks
LINE_EVERY = 60.0  # seconds between two lines if the output is not a terminal
SIGNS = (".lock", "config.yaml", "metrics.jsonl", "logs")  # of a run; launch/submit.py makes logs/, training the others
NARROWEST, WIDEST = 80, 120
NAMES = {"model": "model", "ema": "EMA"}
RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"
COLOURS = {"running": GREEN, "finished": GREEN, "starting": YELLOW, "stopped": YELLOW, "not started": YELLOW}


def main(arguments: argparse.Namespace) -> None:
    """Show the run, then exit with the code of its state."""
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a run's folder")
    if any(folder.iterdir()) and not any((folder / name).exists() for name in SIGNS):
        raise ConfigError(f"{folder} {NO_RUN}")
    watched, terminal = Watched(folder), sys.stdout.isatty()
    try:
        if arguments.once:
            status = watched.look(patient=True)
            print("\n".join(page(watched, status, colours=terminal)))
        elif terminal:
            status = redraw(watched)
        else:
            status = print_lines(watched)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    sys.exit(status.code)


def redraw(watched: Watched) -> Status:
    """Draw the page over itself until the run is over."""
    drawn = 0
    while True:
        status = watched.look()
        lines = page(watched, status, colours=True)[: shutil.get_terminal_size().lines - 1]
        up = f"\x1b[{drawn}F" if drawn else ""
        print(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        drawn = len(lines)
        if status.state in FINAL:
            return status
        time.sleep(TURN)


def print_lines(watched: Watched) -> Status:
    """Print a line a minute, and one for every change of state and every new alarm, until the run is over."""
    printed, state, alarms = float("-inf"), "", set()
    while True:
        status = watched.look()
        new = [alarm for alarm in status.alarms if kind(alarm) not in alarms]
        alarms = {kind(alarm) for alarm in status.alarms}
        if status.state != state or new or time.monotonic() - printed > LINE_EVERY:
            why = f": {status.why}" if status.why and status.state != state else ""
            parts = [
                clock(time.time()),
                status.state + why,
                summary(watched.progress),
                *(f"ALARM {alarm}" for alarm in new),
            ]
            print("  ".join(part for part in parts if part), flush=True)
            printed, state = time.monotonic(), status.state
        if status.state in FINAL:
            return status
        time.sleep(TURN)


def kind(alarm: str) -> str:
    """An alarm without its numbers, which change."""
    return "".join(letter for letter in alarm if not letter.isdigit())


def summary(progress: Progress) -> str:
    train, last = progress.train, total(progress)
    if train is None:
        return f"step {progress.step}/{last}" if progress.start else ""
    speed = f"{rate(train['images_per_second'])} {progress.log.speed_unit}"
    text = f"step {progress.step}/{last}  epoch {train['epoch']:.2f}  loss {number(train['loss'])}  {speed}"
    metric = progress.log.metrics[0]
    scores = "".join(
        f"  {NAMES[weights]} {quantity(metric, newest)}" for weights, (newest, _) in progress.scores().items()
    )
    return f"{text}  data wait {train['data_wait']:.0%}{scores}  {left(progress)} left"


def page(watched: Watched, status: Status, *, colours: bool) -> list[str]:
    """The lines that show a run, no wider than the terminal."""
    progress = watched.progress
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns) - 1)

    def paint(text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if colours and "NO_COLOR" not in os.environ else text

    def wrap(text: str, title: str = "") -> list[str]:
        return textwrap.wrap(text, width, initial_indent=f"{title:<11} ", subsequent_indent=" " * 12)

    state = paint(status.state, BOLD, COLOURS.get(status.state, RED))
    name = shorten(str(watched.run), width - 45)
    lines = [f"{paint(name, BOLD)}  {state}  {clock(time.time())}"]
    if status.why:
        lines += wrap(status.why)
    if progress.start:
        lines += ["", *bar_and_pace(progress, status, width, paint), ""]
        lines += [line for title, text in facts(progress, status, watched.guard) for line in wrap(text, title)]
    for alarm in status.alarms:
        first, *more = wrap(alarm, "ALARM")
        lines += [paint(line, BOLD, RED) for line in (first, *more)]
    return lines


def bar_and_pace(progress: Progress, status: Status, width: int, paint) -> list[str]:
    last = progress.log.last
    done = progress.step / last if last else 0.0
    text = f" {done:6.1%}  step {progress.step:,} of {total(progress)}"
    room = width - len(text) - 2
    full = int(done * room)
    bar = f"[{paint('#' * full, GREEN)}{'-' * (room - full)}]{text}"
    epoch = f"epoch {progress.train['epoch']:.2f}" if progress.train else "before its first step"
    steps = progress.start.get("steps_per_epoch")
    if progress.train and last and steps:
        epoch += f" of {round(last / steps, 2):g}"
    parts = [epoch]
    seconds = progress.seconds_left
    if status.state == "running" and seconds is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + seconds))
        parts.append(f"{duration(seconds)} left ({end})")
    if status.ago is not None:
        parts.append(f"last line {duration(status.ago)} ago")
    return [bar, "   ".join(parts)]


def facts(progress: Progress, status: Status, guard: dict) -> list[tuple[str, str]]:
    rows, train = [], progress.train
    if train:
        learning = f"loss {number(train['loss'])}   lr {number(train['lr'])}   |gradient| {number(train['grad_norm'])}"
        rows.append(("learning", learning))
        mfu = "" if train["mfu"] is None else f"   MFU {train['mfu']:.1%}"
        speed = f"{rate(train['images_per_second'])} {progress.log.speed_unit}   {train['step_ms']:,.0f} ms a step"
        speed += f"   data wait {train['data_wait']:.1%}{mfu}"
        rows.append(("speed", f"{speed}   {counted(progress.start['world_size'], 'rank')}"))
    metric = progress.log.metrics[0]
    scores = [
        f"{NAMES[weights]} {amount(metric, newest)} (best {amount(metric, best)})"
        for weights, (newest, best) in progress.scores().items()
    ]
    if scores:
        title = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
        rows.append((title, f"{'   '.join(scores)}   at step {progress.log.scores()[-1].values['step']:,}"))
    if progress.checkpoint:
        ago = duration(max(0.0, progress.time + (status.ago or 0.0) - progress.checkpoint["time"]))
        rows.append(
            ("checkpoint", f"step {progress.checkpoint['step']:,}{f', {ago} ago' if status.ago is not None else ''}")
        )
    share = f"{status.goodput:.1%} of all time was productive   " if status.goodput is not None else ""
    lost = f"{counted(status.restarts, 'restart')}   {counted(status.lost_steps, 'step')} lost"
    rows.append(("all starts", share + lost))
    bad = f"bad samples {progress.bad_samples} of {guard['bad_samples']}"
    rows.append(("health", f"{counted(len(progress.skipped), 'step')} skipped   {bad}"))
    return rows


def total(progress: Progress) -> str:
    last = progress.log.last
    return f"{last:,}" if last else "?"


def left(progress: Progress) -> str:
    seconds = progress.seconds_left
    return "?" if seconds is None else duration(seconds)


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def shorten(text: str, room: int) -> str:
    return text if len(text) <= room else f"…{text[1 - room :]}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Watch a run in a terminal, from any node that sees its folder: progress, speed, scores, alarms. "
        "Ends with the run.",
        epilog="exit codes: 10 running, 11 running with alarms, 12 not started, 13 silent (killed, suspended, node "
        "lost) or died (crashed); a run that has ended gives its own: 0 finished, 65, 70, 74 failed, 71 hung, 75 "
        "stopped; 78 bad arguments",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, e.g. runs/cat_b")
    parser.add_argument("--once", action="store_true", help="print the page once; the exit code gives the state")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
