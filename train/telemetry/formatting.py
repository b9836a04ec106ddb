"""Times, sizes, counts and untrusted text, formatted for people."""

import html
import re
import shutil
import textwrap
import time
from collections.abc import Sequence

from data_pipeline.formatting import counted, duration

__all__ = [
    "clock",
    "counted",
    "duration",
    "markdown_table",
    "page_width",
    "printable",
    "rate",
    "size",
    "table",
    "wrapped",
]


def clock(when: float) -> str:
    """A Unix time as local date and time, such as "2026-11-26 23:59:59"."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def size(number: float) -> str:
    """A number of bytes, such as "64 B", "2.03 MB" or "123 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.3g} {unit}"
        number /= 1000


def rate(value: float) -> str:
    """A speed, such as "1,234" or "10", and below that three digits, such as "0.24"."""
    return f"{value:,.0f}" if value >= 9.995 else f"{value:.3g}"


def page_width() -> int:
    """Columns of a page of text: the terminal's, but 60 to 150; 120 where there is no terminal."""
    return min(max(shutil.get_terminal_size((120, 40)).columns, 60), 150)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """`text` in lines that begin with `indent` and are at most `width` long; words, such as paths, stay whole."""
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def printable(text: str) -> str:
    """`text` with unprintable characters, such as a terminal's control sequences, as Python escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in text
    )


def table(rows: Sequence[Sequence[str]], align: str = "<>", widths: Sequence[int] = (0,), gap: str = "  ") -> str:
    """Rows of cells as lines of text, each column as wide as its longest cell.

    align: "<" (left) or ">" (right) for each column. widths: the least width of each column. Both repeat their last
    entry for further columns. gap: between columns. Rows may have different lengths.
    """
    count = max(map(len, rows))
    sides, least = ([*given, *[given[-1]] * (count - len(given))] for given in (align, widths))
    wide = [max(least[column], *(len(row[column]) for row in rows if column < len(row))) for column in range(count)]
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, wide, strict=False)] for row in rows)
    return "\n".join(gap.join(line).rstrip() for line in lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose columns but the first are right-aligned. Nothing in a cell counts as markup."""
    cells = [[re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(cell, quote=False)) for cell in row] for row in rows]
    rules = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rules, *cells))
