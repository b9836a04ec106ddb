"""A task's sections of the report, about a run's newest evaluation. Without torch.

If a task's package has `report_sections(runs: Sequence[EvaluatedRun]) -> list[Section]`, the report calls it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class EvaluatedRun:
    """A run as a task's sections see it.

    config: the resolved one, flat. details: by weights ("ema", "model"), the content of evaluations/<weights>.json.
    one_of_several: other runs are on the page too.
    """

    name: str
    config: dict
    details: dict[str, dict]
    steps_per_epoch: int
    one_of_several: bool

    def epoch(self, step: int) -> str:
        """The number of epochs after `step` steps."""
        return f"{round(step / self.steps_per_epoch, 2):g}"


@dataclass(frozen=True)
class Section:
    """A section of the page. key: its anchor. html: what a template rendered, escaped."""

    key: str
    title: str
    html: Markup


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers are right-aligned; long text may be broken into lines."""

    title: str
    kind: Literal["text", "number", "long"] = "text"


@dataclass(frozen=True)
class Table:
    """For the macro `table`. Cells that are not `Markup` are escaped."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


def text(*titles: str) -> list[Column]:
    return [Column(title) for title in titles]


def numbers(*titles: str) -> list[Column]:
    return [Column(title, "number") for title in titles]


def long(*titles: str) -> list[Column]:
    return [Column(title, "long") for title in titles]


@cache
def templates(folder: Path) -> Environment:
    """The Jinja2 templates in `folder`, and `macros.html.j2` beside this file. Whatever they insert is escaped."""
    loader = FileSystemLoader([folder, Path(__file__).parent])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def weights_name(weights: str) -> str:
    """ "EMA" or "model"."""
    return "EMA" if weights == "ema" else weights


def newest(runs: Sequence[EvaluatedRun], describe: Callable[[EvaluatedRun, dict], dict]) -> list[dict]:
    """For the macro `each`: of each run what `describe(run, details)` says of its newest evaluation, of its EMA if it
    has one.
    """
    parts = []
    for run in runs:
        part = {"heading": run.name if run.one_of_several else None, "weights": None}
        for weights, details in _evaluations(run)[:1]:
            part |= {"weights": weights_name(weights), "epoch": run.epoch(details["step"]), **describe(run, details)}
        parts.append(part)
    return parts


def _evaluations(run: EvaluatedRun) -> list[tuple[str, dict]]:
    """(weights, details), the EMA's first."""
    return [(weights, run.details[weights]) for weights in ("ema", "model") if weights in run.details]


@dataclass(frozen=True)
class ClassRow:
    """A class in the table of classes. name: its first cell. score: in percent; None: it has none. more: last cells."""

    name: str
    count: int
    score: float | None
    more: Sequence[str] = ()


def class_section(
    runs: Sequence[EvaluatedRun],
    rows: Callable[[dict], Sequence[ClassRow]],
    counted: str,
    title: str,
    order: str,
    more: Sequence[str] = (),
    size: tuple[int, int, int] = (60, 30, 15),
) -> Section:
    """The section "classes", lowest score first, with a column for one run's EMA and model, or for each of several
    runs.

    rows: of an evaluation's details, in the order of labels. counted: what `ClassRow.count` counts. title: of a column
    of scores, with {} for the evaluation. order: what the classes are ordered by. more: titles of the last columns.
    size: up to the first number of classes are all shown; of more, so many lowest and highest.
    """
    shown = []
    for run in runs:
        found = _evaluations(run)
        for weights, details in found[:1] if run.one_of_several else found:
            name = weights_name(weights)
            shown.append((f"{run.name}, {name}" if run.one_of_several else name, run, details))
    macro = templates(Path(__file__).parent).get_template("macros.html.j2").module.classes
    if not shown:
        return Section("classes", "Classes", macro(None))
    labels = [label for label, _, _ in shown]
    tables = [dict(zip(_keys(details["classes"]), rows(details), strict=True)) for _, _, details in shown]
    first = tables[0]
    keys = sorted(first, key=lambda key: (101.0 if first[key].score is None else first[key].score, key))
    chosen, which = _extremes(keys, *size)
    columns = [*long("class"), *numbers(counted), *text(*(title.format(label) for label in labels))]
    columns += numbers(*(f"{title}, {labels[0]}" for title in more))
    lines = []
    for key in chosen:
        if key is None:
            lines.append(["…", *("" for _ in columns[1:])])
        else:
            bars = [_bar(table[key].score if key in table else None) for table in tables]
            lines.append([first[key].name, f"{first[key].count:,}", *bars, *first[key].more])
    when = "; ".join(f"{label}: epoch {run.epoch(details['step'])}" for label, run, details in shown)
    it = {"which": which, "order": order, "when": when, "table": Table(columns, lines)}
    return Section("classes", "Classes", macro(it))


def _keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """Of each class its name, and how many classes of this name have smaller labels: datasets that were prepared by
    earlier versions may have several.
    """
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _extremes(classes: Sequence, most: int, lowest: int, highest: int) -> tuple[list, str]:
    """All of `classes` if they are at most `most`, else the first `lowest`, None, and the last `highest`; and which."""
    if len(classes) <= most:
        return list(classes), f"All {len(classes)} classes"
    which = f"The {lowest} lowest and the {highest} highest of {len(classes):,} classes"
    return [*classes[:lowest], None, *classes[-highest:]], which


def _bar(percent: float | None) -> str:
    """A bar and a percentage; None: there is none."""
    if percent is None:
        return "–"
    return Markup('<span class="share"><i style="width:{0}%"></i></span>{0} %').format(f"{percent:.1f}")
