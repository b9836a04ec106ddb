"""Reading docs/results, and Markdown tables from what is in it."""

import json
import textwrap
from pathlib import Path

WIDTH = 120
RESULTS = Path(__file__).resolve().parents[1] / "docs/results"


def find(pattern: str) -> list[Path]:
    """Files of docs/results, sorted by name. Of several with one name: that in docs/results, or the newest folder's."""
    folders = [*sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()), RESULTS]
    found = {path.name: path for folder in folders for path in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def load(name: str) -> dict | None:
    """The result `name`.json, or None if there is none."""
    paths = find(f"{name}.json")
    return json.loads(paths[0].read_text()) if paths else None


def source(result: dict) -> str:
    """Where the numbers come from: command, date, machine and versions."""
    programs = f"Python {result['python']}, torch {result['torch']}, Triton {result['triton']}"
    return f"`python {result['command']}`, {result['date']}, {result['machine']}; {programs}."


def markdown(titles: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    """A table; with `numbers`, all columns but the first are right-aligned."""
    lines = [titles, ["---", *["---:" if numbers else "---"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three significant digits; "–" for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def wrapped(text: str) -> str:
    """`text` with lines of at most WIDTH columns; tables and headings, which cannot be wrapped, stay as they are."""
    lines = []
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        long = len(line) > WIDTH and not line.startswith(("|", "#"))
        options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
        lines += textwrap.wrap(line, WIDTH, **options) if long else [line]
    return "\n".join(lines)
