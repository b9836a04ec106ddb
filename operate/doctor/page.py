"""The doctor's page, as text and as JSON."""

import json
import time
from collections import Counter
from dataclasses import asdict

from operate.doctor.findings import GREEN, RED, YELLOW, Line
from train.telemetry.formatting import page_width, wrapped

COLOURS = {GREEN: "\033[32m", YELLOW: "\033[33m", RED: "\033[1;31m"}
INDENT = 24


def verdict(lines: list[Line]) -> str:
    """ "red" if any line is red, else "green": yellow lines, which could not be checked, stop no run."""
    return RED if any(line.status == RED for line in lines) else GREEN


def page(lines: list[Line], about: str, seconds: float, *, colour: bool) -> str:
    """One page of text; colour: with a terminal's colour codes."""
    width = page_width()

    def painted(text: str, status: str) -> str:
        return f"{COLOURS[status]}{text}\033[0m" if colour else text

    text = [f"doctor: {about}", ""]
    for line in lines:
        head = f"  {painted(f'{line.status:<8}', line.status)}{line.check:<{INDENT - 10}}"
        text.append(head + wrapped(line.says, width, " " * INDENT).lstrip())
        if line.remedy:
            text.append(wrapped(f"remedy: {line.remedy}", width, " " * INDENT))
    counts = Counter(line.status for line in lines)
    summary = ", ".join(f"{counts[status]} {status}" for status in (RED, YELLOW, GREEN) if counts[status])
    result = verdict(lines)
    return "\n".join([*text, "", f"{painted(result.upper(), result)}: {summary}, in {seconds:.0f} s", ""])


def document(lines: list[Line], about: dict, seconds: float, facts: dict[int, dict], hosts: list[str]) -> str:
    """The page as JSON, with every rank's results."""
    measured = [{"rank": rank, "host": hosts[rank], **found} for rank, found in sorted(facts.items())]
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    head = {"verdict": verdict(lines), "time": when, "seconds": round(seconds, 1), **about}
    return json.dumps({**head, "lines": [asdict(line) for line in lines], "ranks": measured}, indent=1) + "\n"
