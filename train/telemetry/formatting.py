"""Times, sizes, counts and untrusted text, formatted for people."""

import time


def clock(when: float) -> str:
    """A Unix time as local date and time, such as "2026-11-26 23:59:59"."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def duration(seconds: float) -> str:
    """A duration, such as "4.2 s", "40 s", "3 min 20 s", "4 h 05 min" or "3 d 04 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = whole // 60
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes < 48 * 60
        else f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
    )


def size(number: float) -> str:
    """A number of bytes, such as "64 B", "2.03 MB" or "123 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.3g} {unit}"
        number /= 1000


def counted(number: int, name: str) -> str:
    """A number with a noun, such as "1 step" or "1,200 steps"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """`text` with unprintable characters, such as a terminal's control sequences, as Python escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in text
    )
