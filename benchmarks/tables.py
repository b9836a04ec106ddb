"""The tables of docs/: one function each, from docs/results and the config's classes; `launch/docs.py` puts them into the pages."""

from collections.abc import Callable
from typing import Any

from benchmarks.config_reference import reference
from benchmarks.gpu_tables import GPU_TABLES, UNMEASURED
from benchmarks.markdown import load, markdown, number, source


def beside_others(name: str, empty: str) -> str:
    """Of `bench.py model`: a table for each model and mode."""
    result = load(name)
    if not result:
        return empty
    if "models" not in result:  # the part of `make gpu` did not come to its end
        return result["says"]
    roofline = result["roofline"]
    of_device = f"{roofline['gigabytes_per_second']:,.0f} GB/s copied, {roofline['tflops']:.3g} TFLOP/s multiplied in {result['precision']}"
    text = [f"{source(result)} In the same run: {of_device}."]
    taken = f"{result['precision']}, batch {result['batch']}, {result['rounds']} rounds of {result['steps']} steps"
    for model, modes in result["models"].items():
        for mode, found in modes.items():
            rows = [[way, *model_cells(row)] for way, row in found["rows"].items()]
            base = "released" if "released" in found["rows"] else rows[0][0]
            speeds = ["img/s", "min – max", f"x {base}", "img/s/GFLOP", "MFU", "MB/img", "of the floor", "GB"]
            titles = ["", *speeds, "forward ms", "backward ms", "optimizer ms"]
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


def overhead() -> str:
    """Of `bench.py train`: DeepSpeed beside a bare loop."""
    rows, commands = [], []
    for name in ("train-cat_t", "train-quickstart"):
        result = load(name)
        ways = result["train"]
        commands.append(source(result))
        spreads = [f"{number(row['median'])} ({number(row['min'])} – {number(row['max'])})" for row in ways.values()]
        rows.append([result["model"], result["precision"], *spreads, f"{result['overhead']:+.1%}"])
    titles = ["model", "precision", *(f"{way}, img/s (min – max)" for way in ways), "DeepSpeed's part of a bare step's time"]
    return "\n\n".join([*commands, markdown(titles, rows)])


def count_table(rows: list[dict[str, Any]]) -> str:
    """The result of `benchmarks.families.count_models`."""
    titles = ["model", "size", "parameters", "paper", "difference", "GMACs", "paper", "difference", "paper's top-1, %"]
    lines = []
    for row in rows:
        millions = row["parameters"] / 1e6
        cells = [row["model"], str(row["size"]), f"{row['parameters']:,}", *beside(millions, row["paper_parameters"], "M")]
        lines.append([*cells, f"{row['gmacs']:.3f}", *beside(row["gmacs"], row["paper_gmacs"], ""), row["paper_top1"] or "–"])
    return markdown(titles, lines, numbers=True)


def beside(value: float, paper: float | None, unit: str) -> list[str]:
    """What the paper prints, and how far we are from it."""
    if paper is None:
        return ["–", "–"]
    difference = round(value / paper - 1, 3) + 0.0  # which makes no -0.0%
    return [f"{paper:g}{unit}", f"{difference:+.1%}"]


def speed() -> str:
    """Of `bench.py models --speed`."""
    result = load("models")
    taken = f"timm {result['timm']}; fp32, batch {result['batch']}, {result['rounds']} rounds of {result['steps']} steps."
    return f"{source(result)} {taken}\n\n{speed_table(result['speed'])}"


def speed_table(speed: dict[str, dict[str, dict]]) -> str:
    """The result of `benchmarks.families.time_models`."""
    lines = []
    for name, modes in speed.items():
        for way in modes["inference"]:
            cells = [f"**{way}**" if way == name else way]
            for mode in ("inference", "training"):
                row = modes[mode][way]
                cells += [f"{row['median']:.2f}", f"{row['min']:.2f} – {row['max']:.2f}", f"{row['ratio']:.2f}"]
            lines.append(cells)
    return markdown(["", "inference, img/s", "min – max", "x", "training, img/s", "min – max", "x"], lines, numbers=True)


TABLES: dict[str, Callable[[], str]] = {
    "cpu": lambda: beside_others("performance-cpu", "Not measured yet."),
    "channels-last": lambda: beside_others("channels-last-cpu", "Not measured yet."),
    "overhead": overhead,
    "predicted": predictions,
    "operators": operators,
    "resources": resources,
    **GPU_TABLES,
    "gpu-model": lambda: beside_others("gpu-model" if load("gpu-model") else "gpu-model-training", UNMEASURED),
    "counts": lambda: f"{source(load('models'))}\n\n{count_table(load('models')['counts'])}",
    "speed": speed,
    "config": reference,
}
