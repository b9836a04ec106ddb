"""A task's sections of the report, about a run's newest evaluation. Without torch.

If a task's package has `report_sections(runs: Sequence[EvaluatedRun]) -> list[Section]`, the report calls it.
"""

from collections.abc import Sequence
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


def evaluations(runs: Sequence[EvaluatedRun]) -> list[tuple[str, EvaluatedRun, dict]]:
    """The columns of a table, (label, run, details): one run's EMA and model, or one column of each of several runs."""
    shown = []
    for run in runs:
        found = [(weights, run.details[weights]) for weights in ("ema", "model") if weights in run.details]
        for weights, details in found[:1] if run.one_of_several else found:
            name = weights_name(weights)
            shown.append((f"{run.name}, {name}" if run.one_of_several else name, run, details))
    return shown


def epochs(shown: Sequence[tuple[str, EvaluatedRun, dict]]) -> str:
    """When each of the `evaluations` took place."""
    return "; ".join(f"{label}: epoch {run.epoch(details['step'])}" for label, run, details in shown)


def extremes(classes: Sequence, most: int, lowest: int, highest: int) -> tuple[list, str]:
    """All of `classes` if they are at most `most`, else the first `lowest`, None, and the last `highest`; and which."""
    if len(classes) <= most:
        return list(classes), f"All {len(classes)} classes"
    which = f"The {lowest} lowest and the {highest} highest of {len(classes):,} classes"
    return [*classes[:lowest], None, *classes[-highest:]], which


def bar(percent: float | None) -> str:
    """A bar and a percentage; None: there is none."""
    if percent is None:
        return "–"
    return Markup('<span class="share"><i style="width:{0}%"></i></span>{0} %').format(f"{percent:.1f}")
