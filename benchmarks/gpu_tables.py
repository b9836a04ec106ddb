"""The tables of docs/performance.md that only a GPU can fill: one function each."""

import json
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from statistics import median

from benchmarks.markdown import find, load, markdown, number, source

UNMEASURED = "Not measured yet: `make gpu` has not been run on a machine with a GPU."
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
        if "passed" in part
    ]
    return markdown(["part", "", "s", "", "machine", "date"], rows) if rows else UNMEASURED


def correctness() -> str:
    """Of `gpu-check.json`: the largest errors against float64, by module and precision."""
    result = load("gpu-check")
    if not result or "cases" not in result:
        return UNMEASURED
    rows = []
    key = itemgetter("module", "dtype")
    for (module, dtype), group in groupby(sorted(result["cases"], key=key), key):
        cases = list(group)
        errors = [error for case in cases for error in case["errors"].values()]
        largest = [f"{max(error[way] for error in errors):.1e}" for way in ("kernel", "plain")]
        rows.append([module, dtype, str(len(cases)), *largest])
    titles = ["kernel", "precision", "cases", "largest error, kernel", "largest error, plain PyTorch"]
    return markdown(titles, rows)


def resume() -> str:
    """Of `gpu-train.json`: where the losses of a run and of the same run, killed and resumed, differ."""
    result = load("gpu-train")
    if not result or "losses" not in result:
        return UNMEASURED
    pairs = list(zip(result["losses"], result["losses_resumed"], strict=False))
    gaps = [abs(whole - resumed) for whole, resumed in pairs]
    first = next((step for step, gap in enumerate(gaps, 1) if gap), None)
    if first is None:
        return f"All {len(gaps)} losses that both runs have are equal to the last bit."
    rows = [
        [str(step), f"{pairs[step - 1][0]:.7f}", f"{pairs[step - 1][1]:.7f}", f"{gaps[step - 1]:.1e}"]
        for step in (1, first, 20, 100)
    ]
    return markdown(["step", "loss, first run", "loss, second run", "difference"], rows)


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
    if "rows" not in result:
        return result["says"]
    rows = []
    for (name, stage, direction), group in groupby(result["rows"], itemgetter("name", "stage", "direction")):
        ways = {row["way"]: row for row in group}
        times = [
            number(ways[way]["microseconds"]) if way in ways else "–" for way in ("kernel", "plain", "plain, compiled")
        ]
        kernel = ways["kernel"]
        rows.append([name, str(stage), direction, *times, f"{kernel['speedup']:.2f}", f"{kernel['bandwidth']:.0%}"])
    titles = ["", "stage", "", "kernel, µs", "plain, µs", "plain compiled, µs", "plain / kernel", "of the bandwidth"]
    return f"{source(result)} {result['precision']}, batch {result['batch']}.\n\n{markdown(titles, rows)}"


GPU_TABLES: dict[str, Callable[[], str]] = {
    "gpu": parts,
    "gpu-check": correctness,
    "gpu-resume": resume,
    "gpu-runs": training_runs,
    "gpu-kernels": kernels,
}
