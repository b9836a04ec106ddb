#!/usr/bin/env python
"""Make the tables of docs/performance.md from docs/results/performance-*.json and gpu-*.json: python launch/performance.py [--check]"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.cli import Parser

RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/performance.md"
UNMEASURED = "Not measured yet: `make gpu` has not been run on a machine with a GPU."


def main(arguments: argparse.Namespace) -> int:
    """0; with --check 1 where the page is not what the results make of it."""
    before = PAGE.read_text()
    after = filled(before)
    if arguments.check and before != after:
        print("docs/performance.md is not made of docs/results: run python launch/performance.py", file=sys.stderr)
        return 1
    if not arguments.check:
        PAGE.write_text(after)
    return 0


def filled(page: str) -> str:
    """The page, with each table between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def models(name: str, empty: str) -> str:
    """Of `bench.py model`: a table for each model and mode."""
    result = load(name)
    if not result:
        return empty
    if "models" not in result:  # the part of `make gpu` did not come to its end
        return result["says"]
    roofline = result["roofline"]
    of_device = f"{roofline['gigabytes_per_second']:,.0f} GB/s copied, {roofline['tflops']:.3g} TFLOP/s multiplied in {result['precision']}"
    text = [f"{source(result)} In the same run: {of_device}."]
    speeds = ["img/s", "min – max", "x released", "img/s/GFLOP", "MFU", "MB/img", "of the floor", "GB"]
    titles = ["", *speeds, "forward ms", "backward ms", "optimizer ms"]
    taken = f"{result['precision']}, batch {result['batch']}, {result['rounds']} rounds of {result['steps']} steps"
    for model, modes in result["models"].items():
        for mode, found in modes.items():
            rows = [[way, *model_cells(row)] for way, row in found["rows"].items()]
            text.append(f"**{model}, {mode}**, {taken}\n\n{markdown(titles, rows)}")
    return "\n\n".join(text)


def model_cells(row: dict) -> list[str]:
    spread = f"{number(row['min'])} – {number(row['max'])}"
    shares = [f"{row['mfu']:.0%}", number(row["megabytes"]), "–" if row["of_floor"] is None else f"{row['of_floor']:.0%}"]
    phases = [number(row["milliseconds"].get(phase)) for phase in ("forward", "backward", "optimizer")]
    return [number(row["median"]), spread, f"{row['ratio']:.2f}", number(row["per_gflop"]), *shares, number(row["peak_gb"]), *phases]


def predictions() -> str:
    """Of `bench.py model --count-only`."""
    result = load("performance-predicted")
    tables, roofline = [], result["roofline"]
    titles = ["", "GFLOP/img", "MB/img", "arithmetic's floor, img/s", "memory's floor, img/s", "floor, ms for 1000 img"]
    for model, modes in result["models"].items():
        for mode, found in modes.items():
            rows = []
            for way, row in found["rows"].items():
                arithmetic = 1000 * roofline["tflops"] / row["gflops"]
                memory = 1000 * roofline["gigabytes_per_second"] / row["megabytes"]
                floor = 1e6 / min(arithmetic, memory)
                rows.append([way, number(row["gflops"]), number(row["megabytes"]), f"{arithmetic:,.0f}", f"{memory:,.0f}", number(floor)])
            tables.append(f"**{model}, {mode}**, {result['precision']}, batch {result['batch']}\n\n{markdown(titles, rows)}")
    return "\n\n".join([source(result), *tables])


def operators() -> str:
    """Of `bench.py model --count-only`: what moves most in our way."""
    model, modes = next(iter(load("performance-predicted")["models"].items()))
    row = modes["training"]["rows"]["ours"]
    found = row["operators"]
    rows = [[operator, number(moved), f"{moved / row['megabytes']:.0%}"] for operator, moved in found.items()]
    return f"{model}, training:\n\n{markdown(['operator', 'MB/img', 'of all'], rows)}"


def resources() -> str:
    """Of `bench.py kernels --compile-only`."""
    result = load("performance-kernels")
    rows = result["resources"]
    return f"{source(result)}\n\n{markdown([*rows[0]], [[str(value) for value in row.values()] for row in rows])}"


def kernels() -> str:
    result = load("gpu-kernels")
    if not result:
        return UNMEASURED
    if "rows" not in result:
        return result["says"]
    titles = ["kernel", "stage", "direction", "way", "µs", "x plain", "MB at least", "of the bandwidth"]
    rows = [
        [row["name"], str(row["stage"]), row["direction"], row["way"], number(row["microseconds"]), f"{row['speedup']:.2f}"]
        + [number(row["megabytes"]), f"{row['bandwidth']:.0%}"]
        for row in result["rows"]
    ]
    return f"{source(result)} {result['precision']}, batch {result['batch']}.\n\n{markdown(titles, rows)}"


def parts() -> str:
    """Of all of `make gpu`: what each part said."""
    found = {path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))}
    rows = [
        [name, "passed" if part["passed"] else "**failed**", f"{part['seconds']:.0f}", part["says"], part["machine"], part["date"]]
        for name, part in found.items()
    ]
    return markdown(["part", "", "s", "", "machine", "date"], rows) if rows else UNMEASURED


TABLES: dict[str, Callable[[], str]] = {
    "cpu": lambda: models("performance-cpu", "Not measured yet."),
    "predicted": predictions,
    "operators": operators,
    "resources": resources,
    "gpu": parts,
    "gpu-model": lambda: models("gpu-model", UNMEASURED),
    "gpu-kernels": kernels,
}


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(result: dict) -> str:
    """Where the numbers come from."""
    programs = f"Python {result['python']}, torch {result['torch']}, Triton {result['triton']}"
    return f"`python {result['command']}`, {result['date']}, {result['machine']}; {programs}."


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Make the tables of docs/performance.md from docs/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page is stale")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
