"""The report's plots, by matplotlib.

The colours are those of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind people can tell apart. Nothing is
shown by colour alone: lines differ in style and marker, bars in hatching.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from operate.report.run import ReportedRun
from operate.run_folder import Line
from train.telemetry.metrics import Metric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1)))
MARKERS = "osD^vP*"
# Points of a run's curve. A longer curve is drawn as the means of as many parts, in a band of their extremes.
POINTS = 400
EVALUATIONS = 25  # of a run's curve that get a marker
WIDTH = 11.6  # inches: the page's width at 1280 pixels
# (colour, hatching) of each category of train/telemetry/goodput.py, in its order.
LOOK = {
    "productive": ("#009E73", ""),
    "startup": ("#E69F00", "//"),
    "compilation": ("#F0E442", ".."),
    "data_wait": ("#56B4E9", "\\\\"),
    "checkpoint_stall": ("#CC79A7", "xx"),
    "evaluation": ("#0072B2", ""),
    "lost": ("#D55E00", "++"),
    "waiting": ("#DDDDDD", "--"),
    "other": ("#888888", ""),
}
# Events on the time axis: label, marker, colour.
MARKS = {
    "ended": ("start ended early", "v", "#000000"),
    "skipped_step": ("step skipped", "x", "#D55E00"),
    "bad_sample": ("bad sample", "o", "#D55E00"),
    "rollback": ("went back", "<", "#D55E00"),
    "save_failed": ("save failed", "s", "#D55E00"),
    "save_slow": ("slow save", "D", "#D55E00"),
    "slow_rank": ("slow rank", "P", "#D55E00"),
}
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#777777",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "report",  # the same run gives the same file
}


@dataclass(frozen=True)
class Picture:
    """A plot: its name in file names, its alternative text, and the image as SVG and as PNG."""

    name: str
    caption: str
    svg: bytes
    png: bytes


Named = list[tuple[ReportedRun, str]]


def figures(runs: Sequence[ReportedRun], names: Sequence[str]) -> dict[str, Picture]:
    """By name: "learning", "speed" and "time"."""
    named = list(zip(runs, names, strict=True))
    scores = _distinct(run.log.metrics[0].label for run in runs)
    samples = _distinct(run.log.samples for run in runs)
    captions = {
        "learning": f"Loss, learning rate and {scores} against epochs and against hours",
        "speed": f"{samples.capitalize()} per second and the share of time waited for data, against hours",
        "time": "The starts of each run on the time axis, and where the time went",
    }
    draw = {"learning": _learning, "speed": _speed, "time": _time}
    with matplotlib.rc_context(SETTINGS):
        return {name: _picture(name, caption, draw[name](named)) for name, caption in captions.items()}


def _picture(name: str, caption: str, figure: Figure) -> Picture:
    svg, png = BytesIO(), BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=110)
    return Picture(name, caption, svg.getvalue(), png.getvalue())


def _learning(named: Named) -> Figure:
    figure = Figure(figsize=(WIDTH, 8.2), layout="constrained")
    axes = figure.subplots(3, 2, sharex="col", sharey="row")
    unit, scale = _time_unit(named)
    score = _distinct(_axis_label(run.log.metrics[0]) for run, _ in named)
    for index, (run, name) in enumerate(named):
        look = _look(index)
        for row, key in enumerate(("loss", "lr")):
            _curve(axes[row, 0], run, run.epoch, key, look, label=name)
            _story(axes[row, 1], run, scale, key, look)
        for weights, called, style, fill in (("model", "model", "--", "none"), ("ema", "EMA", "-", "full")):
            if scores := run.log.scores(weights):
                label = f"{name}, {called}" if len(named) > 1 else called
                shape = {
                    "marker": MARKERS[index % len(MARKERS)],
                    "markersize": 3.5,
                    "fillstyle": fill,
                    "lw": 1.2,
                    "label": label,
                }
                shape["markevery"] = -(-len(scores) // EVALUATIONS)
                values = _values(scores, run.log.metrics[0].name)
                axes[2, 0].plot([run.epoch(line) for line in scores], values, **{**look, **shape, "ls": style})
                axes[2, 1].plot([line.hours * scale for line in scores], values, **{**look, **shape, "ls": style})
        for launch in run.launches[1:]:
            axes[2, 1].axvline(launch.began * scale, color=look["color"], ls=":", lw=1, alpha=0.7)
    for axis, label in zip(axes[:, 0], ("training loss", "learning rate", score), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].set_title("against epochs")
    axes[0, 1].set_title(f"against {unit}; dotted: a restart; pale: taken again")
    axes[2, 0].set_xlabel("epochs")
    axes[2, 1].set_xlabel(f"{unit} since the first start")
    if len(named) > 1:
        _legend(axes[0, 0])
    _legend(axes[2, 0], "lower right")
    return figure


def _speed(named: Named) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    speed, wait = figure.subplots(2, 1, sharex=True)
    unit, scale = _time_unit(named)
    for index, (run, name) in enumerate(named):
        _story(speed, run, scale, "images_per_second", _look(index), label=name)
        _story(wait, run, scale, "data_wait", _look(index), factor=100)
    speed.set_ylabel(_distinct(f"{run.log.samples} / s" for run, _ in named))
    speed.set_ylim(bottom=0)
    wait.set_ylabel("data wait, % of a step")
    wait.set_ylim(0, max(5, wait.get_ylim()[1]))
    wait.set_xlabel(f"{unit} since the first start; dotted: a restart")
    if len(named) > 1:
        _legend(speed, "lower right", bbox_to_anchor=(1, 1), ncols=4)
    return figure


def _time(named: Named) -> Figure:
    figure = Figure(figsize=(WIDTH, 2.9 + 0.9 * len(named)), layout="constrained")
    axes = figure.subplots(2, 1)
    _starts(axes[0], named)
    _split(axes[1], named)
    for axis in axes:
        axis.set_yticks(range(len(named)), [name for _, name in named])
        axis.set_ylim(len(named) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=9, handlelength=1.6, columnspacing=1.2
    )
    return figure


def _starts(axis: Axes, named: Named) -> None:
    unit, scale = _time_unit(named)
    marks: dict[str, tuple[list[float], list[float]]] = {}  # by event: where it happened, and in which row

    def mark(event: str, hours: float, row: float) -> None:
        times, rows = marks.setdefault(event, ([], []))
        times.append(hours * scale)
        rows.append(row)

    for row, (run, _) in enumerate(named):
        for number, launch in enumerate(run.launches):
            width, shade = (launch.ended - launch.began) * scale, ("#9ecae1", "#c6dbef")[number % 2]
            axis.barh(
                row, width, left=launch.began * scale, height=0.5, color=shade, edgecolor="#34495e", linewidth=0.6
            )
            if launch.end not in ("finished", ""):
                mark("ended", launch.ended, row - 0.37)
        for line in run.incidents():
            if line.values["event"] in MARKS:
                mark(line.values["event"], line.hours, row + 0.37)
    for event, (text, marker, colour) in MARKS.items():
        if event in marks:
            axis.plot(*marks[event], marker, color=colour, markersize=5, fillstyle="none", label=text, clip_on=False)
    axis.set_title("starts: a box is a start, from its beginning to its last sign of life")
    axis.set_xlabel(f"{unit} since the first start")
    _legend(axis, "lower right", bbox_to_anchor=(1, 0.97), ncols=len(MARKS))


def _split(axis: Axes, named: Named) -> None:
    for row, (run, _) in enumerate(named):
        left = 0.0
        for category, (colour, hatch) in LOOK.items():
            share = 100 * run.seconds[category] / (run.total or 1)
            label = category.replace("_", " ") if row == 0 else None
            axis.barh(
                row,
                share,
                left=left,
                height=0.6,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
                label=label,
            )
            if share >= 4:
                box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.2}
                axis.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", fontsize=8, bbox=box)
            left += share
    axis.set_title("where the time went")
    axis.set_xlabel("% of the time since the first start")
    axis.set_xlim(0, 100)


def _curve(
    axis: Axes,
    run: ReportedRun,
    x: Callable[[Line], float],
    key: str,
    look: dict,
    *,
    label: str | None = None,
) -> None:
    """One value of the train lines that count."""
    _line(axis, run, [line for line in run.log.train if not line.again], x, key, 1, {**look, "label": label})


def _story(
    axis: Axes, run: ReportedRun, scale: float, key: str, look: dict, *, label: str | None = None, factor: float = 1
) -> None:
    """One value of all train lines against time, with a gap between two starts.

    Steps that were taken again are pale; restarts are dotted lines.
    """
    restarts = [launch.began for launch in run.launches[1:]]
    for (_, again), lines in groupby(run.log.train, lambda line: (bisect_right(restarts, line.hours), line.again)):
        pale = {"alpha": 0.3, "lw": 2.2} if again else {"label": label}
        label = label if again else None
        _line(axis, run, list(lines), lambda line: line.hours * scale, key, factor, {**look, **pale})
    for restart in restarts:
        axis.axvline(restart * scale, color=look["color"], ls=":", lw=1, alpha=0.7)


def _look(index: int) -> dict:
    """The colour and line style of run number `index`."""
    return {"color": COLOURS[index % len(COLOURS)], "ls": STYLES[index % len(STYLES)]}


def _line(
    axis: Axes, run: ReportedRun, lines: list[Line], where: Callable[[Line], float], key: str, factor: float, look: dict
) -> None:
    """Draw a part of a run's curve, or all of it."""
    x, y = np.array(list(map(where, lines))), factor * _values(lines, key)
    if len(run.log.train) > POINTS:
        parts = np.array_split(np.arange(len(x)), -(-len(x) * POINTS // len(run.log.train)))
        low, mean, high = (np.array([_finite(pick, y[part]) for part in parts]) for pick in (np.min, np.mean, np.max))
        x, y = np.array([x[part].mean() for part in parts]), mean
        axis.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
    marker = {"marker": ".", "markersize": 4} if len(x) == 1 else {}
    axis.plot(x, y, **{"lw": 1.1, **marker, **look})


def _finite(pick: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return pick(there) if len(there) else float("nan")


def _values(lines: list[Line], key: str) -> np.ndarray:
    """The lines' values of `key`. A value that is not finite is null in the file, and a gap in the plot."""
    return np.array([line.values[key] for line in lines], dtype=float)


def _time_unit(named: Named) -> tuple[str, float]:
    """(name, number in an hour) of the time axis's unit: minutes if all runs have taken less than two hours."""
    return ("hours", 1.0) if max(run.total for run, _ in named) > 7200 else ("minutes", 60.0)


def _axis_label(metric: Metric) -> str:
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _legend(axis: Axes, place: str = "upper right", **look: object) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=place, **look)
