"""How times, sizes and counts are said to people."""

import time
from collections.abc import Sequence


def clock(when: float) -> str:
    """A Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def duration(seconds: float) -> str:
    """Such as "4.2 s", "40 s", "3 min 20 s", "4 h 05 min" or "3 d 04 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = whole // 60
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 48 * 60 else f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


def size(number: float) -> str:
    """Bytes, such as "64 B", "2.03 MB" or "123 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.3g} {unit}"
        number /= 1000


def counted(number: int, name: str) -> str:
    """Such as "1 step" or "1,200 steps"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """`text` without what a terminal obeys: characters that do not print are shown as Python writes them."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode() for letter in text)


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
