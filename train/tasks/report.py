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
