"""A plan as a JSON file, and several of them side by side."""

import json
from dataclasses import asdict
from pathlib import Path

from operate.plan.cluster import NUMBERS
from operate.plan.plan import Plan
from operate.plan.step import STAGES, step
from operate.plan.text import headline
from train.config import ConfigError


def record(title: str, own: Plan, best: Plan, sizes: dict[int, dict[str, int]], plans: list[Plan]) -> dict:
    """A plan as JSON can hold it: times in seconds, memory in bytes."""

    def of(plan: Plan) -> dict:
        outcomes = {"closed_form": asdict(plan.expected) | {"wall": plan.expected.wall}}
        outcomes["simulated"] = asdict(plan.simulated) | {"wall": plan.simulated.wall, "standard_error": plan.error}
        numbers = {"gpus": plan.cluster.world, "goodput": plan.goodput, "gpu_hours": plan.gpu_hours, "price": plan.price}
        return numbers | outcomes | {"timeline": asdict(plan.timeline), "job": asdict(plan.job)}

    values = {name: getattr(own.cluster, name) for name in NUMBERS}
    return {
        "title": title,
        "assumptions": {
            name: {"value": value, "unit": NUMBERS[name].metadata["unit"], "origin": own.cluster.origin(name)}
            for name, value in values.items()
            if value is not None
        },
        "headline": {"as configured": headline(own), "best interval": headline(best)},
        "zero": {stage: asdict(step(own.job, own.cluster, stage)) | {"memory": sizes[stage]} for stage in STAGES},
        "as configured": of(own),
        "best interval": of(best),
        "scale": [of(plan) for plan in plans],
    }


def compare(paths: list[str]) -> str:
    """Plans side by side, and the assumptions in which they differ."""
    plans = []
    for path in paths:
        try:
            plans.append(json.loads(Path(path).read_text()))
            plans[-1]["headline"]["best interval"], plans[-1]["assumptions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a plan ({error}): write one with plan.py … --json {path}") from error
    rows = [("", [Path(path).stem for path in paths]), ("", [plan["title"] for plan in plans])]
    heads = [plan["headline"]["best interval"] for plan in plans]
    rows += [(name, [head.get(name, "-") for head in heads]) for name in dict.fromkeys(name for head in heads for name in head)]
    assumed = [plan["assumptions"] for plan in plans]
    for name in dict.fromkeys(name for of_plan in assumed for name in of_plan):
        cells = [f"{of_plan[name]['value']:,.5g} {of_plan[name]['unit']}" if name in of_plan else "-" for of_plan in assumed]
        if len(set(cells)) > 1:
            guessed = ["?" * of_plan.get(name, {"origin": ""})["origin"].startswith("GUESSED") for of_plan in assumed]
            rows.append((name.replace("_", " "), [cell + mark for cell, mark in zip(cells, guessed, strict=True)]))
    wide = 2 + max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(f"{name:<26}" + "".join(f"{cell:>{wide}}" for cell in cells) for name, cells in rows) + "\n? guessed"
