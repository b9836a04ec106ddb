"""Text for people. Here and not in `train`, so that preparation can use it too."""

from collections.abc import Sequence


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
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


def first_five(names: Sequence[str]) -> str:
    """The names with commas, from the sixth on as their number."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def counted(number: int, name: str) -> str:
    """A number with a noun, such as "1 step", "2 classes" or "1,200 steps"."""
    ending = "" if number == 1 else "es" if name.endswith(("s", "x")) else "s"
    return f"{number:,} {name}{ending}"
