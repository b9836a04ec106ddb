"""The tables of docs/gpu.md and docs/performance.md that only a GPU can fill: one function each."""

import json
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from statistics import median

from benchmarks.markdown import find, load, markdown, number, source

UNMEASURED = "Not measured yet."
LISTED = 0.2  # ms of a step
WARM_UP = 10  # steps of a training run that are left out: compilation, and the capture of CUDA graphs


def parts() -> str:
    """The outcome of each part of `make gpu`."""
    results = {path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in find("gpu-*.json")}
    rows = [
        [
            name,
            "passed" if part["passed"] else "**failed**",
            f"{part['seconds']:.0f}",
            part["says"],
            part["machine"],
            part["date"],
        ]
        for name, part in results.items()
        if "passed" in part and "says" in part
    ]
    return markdown(["part", "", "s", "", "machine", "date"], rows) if rows else UNMEASURED


def correctness() -> str:
    """Of `gpu-check.json`: the largest errors against float64, by module and precision."""
    result = load("gpu-check")
    if not result:
        return UNMEASURED
    found = result["rows"] if "rows" in result else result["cases"]  # files before 2026-11-27 have "cases"
    rows = []
    key = itemgetter("module", "dtype")
    for (module, dtype), group in groupby(sorted(found, key=key), key):
        cases = list(group)
        errors = [error for case in cases for error in case["errors"].values()]
        largest = [f"{max(error[way] for error in errors):.1e}" for way in ("kernel", "plain")]
        rows.append([module, dtype, str(len(cases)), *largest])
    titles = ["kernel", "precision", "cases", "largest error, kernel", "largest error, plain PyTorch"]
    return markdown(titles, rows)


def exact() -> str:
    """Of `gpu-exact.json`: per family and way, the gradients that differ between passes of the same step."""
    titles = ["network", "gradients", "differ between passes", "differ from the compiled step"]

    def cells(row: dict) -> list[str]:
        differ = [row["different"], row.get("different_from_compiled")]
        return [row["name"], str(row["gradients"]), *("–" if names is None else listed(names) for names in differ)]

    return rows_table("gpu-exact", titles, cells)


def listed(names: list[str]) -> str:
    """The number of names, and the first three."""
    if not names:
        return "0"
    return f"**{len(names)}**: {', '.join(f'`{name}`' for name in names[:3])}{', …' if len(names) > 3 else ''}"


def resume() -> str:
    """Of `gpu-train.json`: at which step a run's losses first differ from the same run's, whole and with graphs."""
    runs: dict[str, list[float]] = {}

    def cells(row: dict) -> list[str]:
        if row["run"] == "whole":
            runs[row["family"]] = row["losses"]
        other = runs[row["family"]]
        step = first_difference(other, row["losses"])
        killed = f"killed after {row['killed_at']}, resumed from {row['resumed_from']}" if "killed_at" in row else ""
        gap = "" if step is None else f"{abs(other[step - 1] - row['losses'][step - 1]):.1e}"
        return [row["family"], row["run"], killed, str(len(row["losses"])), "none" if step is None else str(step), gap]

    titles = ["family", "run", "", "steps", "first step that differs from the whole run", "by"]
    return rows_table("gpu-train", titles, cells)


def first_difference(one: list[float], other: list[float]) -> int | None:
    """The first step, counted from 1, at which both have losses that differ."""
    return next((step for step, (a, b) in enumerate(zip(one, other, strict=False), 1) if a != b), None)


def steps(name: str) -> str:
    """Of `gpu-model.json` or `gpu-inference.json`: whole steps."""
    titles = ["", "img/s", "min – max", "ms a step", "host, ms", "GB reserved, peak", "GB reserved, after"]

    def cells(row: dict) -> list[str]:
        spread = f"{number(row['min'])} – {number(row['max'])}"
        memory = [number(row.get(key)) for key in ("peak_gb", "reserved_gb")]
        return [
            row["name"],
            number(row["images_per_second"]),
            spread,
            number(row["ms"]),
            number(row["host_ms"]),
            *memory,
        ]

    return rows_table(name, titles, cells)


def profile() -> str:
    """Of `gpu-profile.json`: the kernels that take at least LISTED ms of a step."""
    return rows_table("gpu-profile", ["kernel", "ms a step", "calls"], profile_cells)


def profile_cells(row: dict) -> list[str] | None:
    if row["ms"] < LISTED:
        return None
    return [f"`{row['name'][:90]}`".replace("|", "\\|"), f"{row['ms']:.2f}", number(row["calls"])]


def host() -> str:
    """Of `gpu-host.json`: what calls and passes cost the host."""

    def cells(row: dict) -> list[str] | None:
        if row["kind"] == "step":
            passes = f"forward {number(row['forward_ms'])} ms, backward {number(row['backward_ms'])} ms"
            device = f"{number(row['device_ms'])} ms in {number(row['launches'])} launches"
            return [row["name"], passes, device]
        return [f"`{row['name']}`", f"{number(row['us'])} µs"] if row["kind"] == "call" else None

    return rows_table("gpu-host", ["", "the host's time", "the device's"], cells)


def loader() -> str:
    """Of `gpu-loader.json`: the loader alone on some cores."""
    titles = [
        "cores",
        "img/s",
        "a core",
        "decoder alone, 1 core",
        "share of that x cores",
        "share of decoders together",
    ]

    def cells(row: dict) -> list[str]:
        rates = [number(row[key]) for key in ("images_per_second", "per_core", "decoder_alone")]
        return [str(row["cores"]), *rates, f"{row['share']:.2f}", f"{row['share_of_together']:.2f}"]

    return rows_table("gpu-loader", titles, cells)


def recipe() -> str:
    """Of `gpu-recipe.json`: what the augmentation of a micro-batch costs."""
    titles = ["images", "recipe", "way", "launches", "kernels, ms", "host, ms", "many queued, ms"]

    def cells(row: dict) -> list[str] | None:
        if row.get("kind") != "time":
            return None
        numbers = [number(row[key]) for key in ("launches", "kernel_ms", "host_ms", "together_ms")]
        return [f"{row['images']} x {row['size']}", row["recipe"], row["way"], *numbers]

    return rows_table("gpu-recipe", titles, cells)


def rows_table(name: str, titles: list[str], cells: Callable[[dict], list[str] | None]) -> str:
    """A part's rows as a table under its source; of a row that could not be measured, its name and the reason."""
    result = load(name)
    if not result or not result.get("rows"):
        return UNMEASURED
    rows = [[row["name"], row["failed"]] if "failed" in row else cells(row) for row in result["rows"]]
    rows = [[*row, *[""] * (len(titles) - len(row))] for row in rows if row]
    return f"{source(result)}\n\n{markdown(titles, rows)}"


def training_runs() -> str:
    """Of the metrics.jsonl of whole runs: speed after warm-up, and what a start costs."""
    rows = [
        training_run(path.name.removesuffix("-metrics.jsonl"), path.read_text())
        for path in find("train-*-metrics.jsonl")
    ]
    titles = [
        "run",
        "img/s, median",
        "min – max",
        "ms a step",
        "data wait",
        "start-up, s",
        "first step, s",
        "last save, s",
    ]
    return markdown(titles, rows, numbers=True) if rows else UNMEASURED


def training_run(name: str, text: str) -> list[str]:
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    warm = [line for line in steps if line["step"] > WARM_UP]
    speeds = [line["images_per_second"] for line in warm]
    start, save = (next(line for line in lines if line.get("event") == event) for event in ("start", "checkpoint"))
    return [
        name,
        number(median(speeds)),
        f"{number(min(speeds))} – {number(max(speeds))}",
        number(median(line["step_ms"] for line in warm)),
        f"{median(line['data_wait'] for line in warm):.1%}",
        number(start["startup_seconds"]),
        number(steps[0]["step_ms"] / 1000),
        number(save["stall_seconds"]),
    ]


def kernels() -> str:
    """Of `bench.py kernels`: each kernel beside plain PyTorch, eager and compiled."""
    result = load("gpu-kernels")
    if not result:
        return UNMEASURED
    if not result.get("rows"):
        return result["says"]
    rows = []
    for (name, stage, direction), group in groupby(result["rows"], itemgetter("name", "stage", "direction")):
        ways = {row["way"]: row for row in group}
        timed = ("kernel", "kernel, packed", "kernel, bias apart", "kernel, drop-path", "plain", "plain, compiled")
        times = [number(ways[way]["microseconds"]) if way in ways else "–" for way in timed]
        kernel = ways["kernel"]
        rows.append([name, str(stage), direction, *times, f"{kernel['speedup']:.2f}", f"{kernel['bandwidth']:.0%}"])
    titles = ["", "stage", "", "kernel, µs", "packed, µs", "bias apart, µs", "drop-path, µs", "plain, µs"]
    titles += ["plain compiled, µs", "plain / kernel", "of the bandwidth"]
    about = {**result["rows"][0], **result}
    return f"{source(result)} {about['precision']}, batch {about['batch']}.\n\n{markdown(titles, rows)}"


GPU_TABLES: dict[str, Callable[[], str]] = {
    "gpu": parts,
    "gpu-check": correctness,
    "gpu-exact": exact,
    "gpu-resume": resume,
    "gpu-steps": lambda: steps("gpu-model"),
    "gpu-inference": lambda: steps("gpu-inference"),
    "gpu-layout": lambda: steps("gpu-layout"),
    "gpu-profile": profile,
    "gpu-host": host,
    "gpu-loader": loader,
    "gpu-recipe": recipe,
    "gpu-runs": training_runs,
    "gpu-kernels": kernels,
}
