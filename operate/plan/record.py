"""Write a plan as JSON, and compare several plans."""

import json
from dataclasses import asdict
from pathlib import Path

from operate.plan.cluster import NUMBERS
from operate.plan.plan import Plan
from operate.plan.step_time import STAGES, step_time
from operate.plan.text import headline
from train.config import ConfigError
from train.telemetry.formatting import table


def record(title: str, own: Plan, best: Plan, sizes: dict[int, dict[str, int]], plans: list[Plan]) -> dict:
    """A plan as JSON: times in seconds, memory in bytes."""

    def numbers(plan: Plan) -> dict:
        outcomes = {"closed_form": asdict(plan.expected) | {"wall": plan.expected.wall}}
        outcomes["simulated"] = asdict(plan.simulated) | {"wall": plan.simulated.wall, "standard_error": plan.error}
        totals = {"gpus": plan.cluster.world, "goodput": plan.goodput, "gpu_hours": plan.gpu_hours, "price": plan.price}
        return totals | outcomes | {"timeline": asdict(plan.timeline), "job": asdict(plan.workload)}

    values = {name: getattr(own.cluster, name) for name in NUMBERS}
    return {
        "title": title,
        "assumptions": {
            name: {"value": value, "unit": NUMBERS[name].metadata["unit"], "origin": own.cluster.origin(name)}
            for name, value in values.items()
            if value is not None
        },
        "headline": {"as configured": headline(own), "best interval": headline(best)},
        "zero": {
            stage: asdict(step_time(own.workload, own.cluster, stage)) | {"memory": sizes[stage]} for stage in STAGES
        },
        "as configured": numbers(own),
        "best interval": numbers(best),
        "scale": [numbers(plan) for plan in plans],
    }


def compare(paths: list[str]) -> str:
    """A table of plans side by side, with the assumptions in which they differ."""
    plans = []
    for path in paths:
        try:
            plans.append(json.loads(Path(path).read_text()))
            plans[-1]["headline"]["best interval"], plans[-1]["assumptions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a plan ({error}): write one with plan.py … --json {path}") from error
    rows = [["", *(Path(path).stem for path in paths)], ["", *(plan["title"] for plan in plans)]]
    heads = [plan["headline"]["best interval"] for plan in plans]
    for name in dict.fromkeys(name for head in heads for name in head):
        rows.append([name, *(head.get(name, "-") for head in heads)])
    assumptions = [plan["assumptions"] for plan in plans]
    for name in dict.fromkeys(name for entries in assumptions for name in entries):
        found = [entries.get(name) for entries in assumptions]
        cells = [f"{entry['value']:,.5g} {entry['unit']}" if entry else "-" for entry in found]
        if len(set(cells)) > 1:
            guessed = ["?" if entry and entry["origin"].startswith("GUESSED") else "" for entry in found]
            rows.append([name.replace("_", " "), *map("".join, zip(cells, guessed, strict=True))])
    widest = max(len(cell) for row in rows for cell in row[1:])
    return table(rows, widths=(26, widest)) + "\n? guessed"
