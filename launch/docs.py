#!/usr/bin/env python
"""Make the tables of docs/ from docs/results and the config's classes: python launch/docs.py [--check]"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.markdown import wrapped
from benchmarks.tables import TABLES
from launch.cli import Parser

TABLE = re.compile(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", flags=re.DOTALL)


def main(arguments: argparse.Namespace) -> int:
    """Write the tables. With --check, change nothing and return 1 if a page is stale."""
    stale = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = page.read_text()
        after = TABLE.sub(lambda found: f"{found[1]}\n{wrapped(TABLES[found[2]]())}\n{found[3]}", before)
        if before != after:
            stale.append(f"docs/{page.name}")
            if not arguments.check:
                page.write_text(after)
    if stale and arguments.check:
        print(
            f"{', '.join(stale)}: not up to date with docs/results and the config's classes; run python launch/docs.py",
            file=sys.stderr,
        )
    return int(bool(stale) and arguments.check)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Make the tables of docs/*.md, between `<!-- table: NAME -->` and `<!-- end -->`, from "
        "docs/results and the config's classes."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is stale")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
