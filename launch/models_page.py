#!/usr/bin/env python
"""Make the tables of docs/models.md from docs/results/models.json: python launch/models_page.py [--check]"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.cli import Parser

RESULT, PAGE = ROOT / "docs/results/models.json", ROOT / "docs/models.md"


def main(arguments: argparse.Namespace) -> int:
    """0; with --check 1 where the page is not what the result makes of it."""
    before = PAGE.read_text()
    after = filled(before, json.loads(RESULT.read_text()))
    if arguments.check and before != after:
        print("docs/models.md is not made of docs/results/models.json: run python launch/models_page.py", file=sys.stderr)
        return 1
    if not arguments.check:
        PAGE.write_text(after)
    return 0


def filled(page: str, result: dict) -> str:
    """The page, with each table between `<!-- table: NAME -->` and `<!-- end -->` made of the result of `bench.py models --json`."""
    source = f"`python {result['command']}`, {result['date']}, {result['machine']}; torch {result['torch']}, timm {result['timm']}."
    tables = {"counts": f"{source}\n\n{count_table(result['counts'])}", "speed": "Not measured yet."}
    if "speed" in result:
        taken = f"fp32, batch {result['batch']}, {result['rounds']} rounds of {result['steps']} steps."
        tables["speed"] = f"{source} {taken}\n\n{speed_table(result['speed'])}"
    return re.sub(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", lambda m: f"{m[1]}\n{tables[m[2]]}\n{m[3]}", page, flags=re.DOTALL)


def count_table(rows: list[dict[str, Any]]) -> str:
    """The result of `train.bench_models.count_models` as a table, in Markdown."""
    titles = ["model", "size", "parameters", "paper", "difference", "GMACs", "paper", "difference", "paper's top-1, %"]
    lines = [titles, ["---", *["---:"] * 7, ":---:"]]
    for row in rows:
        millions = row["parameters"] / 1e6
        cells = [row["model"], str(row["size"]), f"{row['parameters']:,}", *beside(millions, row["paper_parameters"], "M")]
        lines.append([*cells, f"{row['gmacs']:.3f}", *beside(row["gmacs"], row["paper_gmacs"], ""), row["paper_top1"] or "–"])
    return markdown(lines)


def beside(value: float, paper: float | None, unit: str) -> list[str]:
    """What the paper prints, and how far we are from it."""
    if paper is None:
        return ["–", "–"]
    difference = round(value / paper - 1, 3) + 0.0  # which makes no -0.0%
    return [f"{paper:g}{unit}", f"{difference:+.1%}"]


def speed_table(speed: dict[str, dict[str, dict]]) -> str:
    """The result of `train.bench_models.time_models` as a table, in Markdown."""
    lines = [["", "inference, img/s", "min – max", "x", "training, img/s", "min – max", "x"], ["---", *["---:"] * 6]]
    for name, modes in speed.items():
        for way in modes["inference"]:
            cells = [f"**{way}**" if way == name else way]
            for mode in ("inference", "training"):
                row = modes[mode][way]
                cells += [f"{row['median']:.2f}", f"{row['min']:.2f} – {row['max']:.2f}", f"{row['ratio']:.2f}"]
            lines.append(cells)
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Make the tables of docs/models.md from docs/results/models.json.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page is stale")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
