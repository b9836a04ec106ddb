"""The tables of docs/, made from docs/results and the config's classes; launch/docs.py writes them into the pages."""

from collections.abc import Callable
from typing import Any

from benchmarks.config_reference import reference
from benchmarks.gpu.tables import GPU_TABLES, UNMEASURED
from benchmarks.markdown import load, markdown, number, source


def model_speeds(name: str, empty: str) -> str:
    """Results of `bench.py model`: a table for each model and mode; `empty` if there are none."""
    result = load(name)
    if not result:
        return empty
    roofline = result["roofline"]
    copied, multiplied = f"{roofline['gigabytes_per_second']:,.0f} GB/s", f"{roofline['tflops']:.3g} TFLOP/s"
    text = [f"{source(result)} In the same run: {copied} copied, {multiplied} multiplied in {result['precision']}."]
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
    of_floor = "–" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
    speeds = [number(row["median"]), spread, f"{row['ratio']:.2f}", number(row["per_gflop"])]
    phases = [number(row["milliseconds"].get(phase)) for phase in ("forward", "backward", "optimizer")]
    return [*speeds, f"{row['mfu']:.0%}", number(row["megabytes"]), of_floor, number(row["peak_gb"]), *phases]


def predictions() -> str:
    """Results of `bench.py model --count-only`."""
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
                counts = [number(row["gflops"]), number(row["megabytes"])]
                rows.append([way, *counts, f"{arithmetic:,.0f}", f"{memory:,.0f}", number(floor)])
            title = f"**{model}, {mode}**, {result['precision']}, batch {result['batch']}"
            tables.append(f"{title}\n\n{markdown(titles, rows)}")
    return "\n\n".join([source(result), *tables])


def operators() -> str:
    """Results of `bench.py model --count-only`: the operators that move most bytes in the way "ours"."""
    model, modes = next(iter(load("performance-predicted")["models"].items()))
    row = modes["training"]["rows"]["ours"]
    found = row["operators"]
    rows = [[operator, number(moved), f"{moved / row['megabytes']:.0%}"] for operator, moved in found.items()]
    return f"{model}, training:\n\n{markdown(['operator', 'MB/img', 'of all'], rows)}"


def resources() -> str:
    """Results of `bench.py kernels --compile-only`."""
    result = load("performance-kernels")
    keys = ["registers", "spilled", "shared", "warps_per_sm", "limit"]
    names = {row["name"]: row["warps"] for row in result["resources"]}
    found = {(row["name"], row["capability"]): [str(row[key]) for key in keys] for row in result["resources"]}
    titles = ["kernel", "warps", *(f"sm_90: {keys[0]}", *keys[1:]), *(f"sm_80: {keys[0]}", *keys[1:])]
    nothing = ["–"] * len(keys)
    rows = [[name, str(warps), *found[name, 90], *found.get((name, 80), nothing)] for name, warps in names.items()]
    return f"{source(result)}\n\n{markdown(titles, rows)}"


def spills() -> str:
    """Results of `bench.py kernels --compile-only`: the kernels that spill registers."""
    rows = []
    for row in load("performance-kernels")["resources"]:
        if row["spilled"]:
            inside, of = row["spills_in_loops"], row["instructions_in_loops"]
            share = f"{inside / of:.1%}" if inside else "–"
            rows.append([row["name"], f"sm_{row['capability']}", str(row["spilled"]), str(inside), str(of), share])
    titles = ["kernel", "GPU", "bytes a thread", "loads and stores in the loop", "instructions of the loop", "share"]
    return markdown(titles, rows)


def overhead() -> str:
    """Results of `bench.py train`: DeepSpeed compared with a bare PyTorch loop."""
    rows, commands = [], []
    for name in ("train-cat_t", "train-quickstart"):
        result = load(name)
        ways = result["train"]
        commands.append(source(result))
        spreads = [f"{number(row['median'])} ({number(row['min'])} – {number(row['max'])})" for row in ways.values()]
        rows.append([result["model"], result["precision"], *spreads, f"{result['overhead']:+.1%}"])
    speeds = [f"{way}, img/s (min – max)" for way in ways]
    titles = ["model", "precision", *speeds, "DeepSpeed's part of a bare step's time"]
    return "\n\n".join([*commands, markdown(titles, rows)])


def count_table(rows: list[dict[str, Any]]) -> str:
    """The result of `families.count_models`."""
    titles = ["model", "size", "parameters", "paper", "difference", "GMACs", "paper", "difference", "paper's top-1, %"]
    lines = []
    for row in rows:
        millions = row["parameters"] / 1e6
        cells = [row["model"], str(row["size"]), f"{row['parameters']:,}"]
        cells += [*compare(millions, row["paper_parameters"], "M"), f"{row['gmacs']:.3f}"]
        lines.append([*cells, *compare(row["gmacs"], row["paper_gmacs"], ""), row["paper_top1"] or "–"])
    return markdown(titles, lines, numbers=True)


def compare(value: float, paper: float | None, unit: str) -> list[str]:
    """The paper's value, and our difference from it."""
    if paper is None:
        return ["–", "–"]
    difference = round(value / paper - 1, 3) + 0.0  # avoids -0.0%
    return [f"{paper:g}{unit}", f"{difference:+.1%}"]


def speed() -> str:
    """Results of `bench.py models --speed`."""
    result = load("models")
    rounds = f"{result['rounds']} rounds of {result['steps']} steps"
    taken = f"timm {result['timm']}; fp32, batch {result['batch']}, {rounds}."
    return f"{source(result)} {taken}\n\n{speed_table(result['speed'])}"


def speed_table(speed: dict[str, dict[str, dict]]) -> str:
    """The result of `families.time_models`."""
    lines = []
    for name, modes in speed.items():
        for way in modes["inference"]:
            cells = [f"**{way}**" if way == name else way]
            for mode in ("inference", "training"):
                row = modes[mode][way]
                cells += [f"{row['median']:.2f}", f"{row['min']:.2f} – {row['max']:.2f}", f"{row['ratio']:.2f}"]
            lines.append(cells)
    titles = ["", "inference, img/s", "min – max", "x", "training, img/s", "min – max", "x"]
    return markdown(titles, lines, numbers=True)


def dense_counts(name: str, table: Callable[[list[dict]], str]) -> str:
    """Results of `bench.py segmenters` or `bench.py detectors`: the networks and their papers' figures."""
    result = load(name)
    return f"{source(result)}\n\n{table(result['counts'])}"


def segmenter_table(rows: list[dict[str, Any]]) -> str:
    """The result of `segmenters.count_segmenters`."""
    counts = ["parameters", "released code", "ours − theirs", "GFLOPs", "paper", "difference", "attention's products"]
    lines = []
    for row in rows:
        paper = row["paper_parameters"]
        released = ["–", "–"] if paper is None else [f"{paper:,}", f"{row['parameters'] - paper:+,}"]
        flops = [f"{row['gflops']:.1f}", *compare(row["gflops"], row["paper_gflops"], ""), f"{row['attention']:.1f}"]
        lines.append([row["model"], f"{row['parameters']:,}", *released, *flops, row["paper_miou"] or "–"])
    return markdown(["backbone", *counts, "papers' mIoU, % (not reproduced here)"], lines, numbers=True)


def detector_table(rows: list[dict[str, Any]]) -> str:
    """The result of `detectors.count_detectors`."""
    counts = ["parameters", "released code", "ours − theirs", "GFLOPs", "attention's products", "paper", "difference"]
    lines = []
    for row in rows:
        paper = row["paper_parameters"]
        released = ["–", "–"] if paper is None else [f"{paper:,}", f"{row['parameters'] - paper:+,}"]
        comparable = row["gflops"] + row["attention"] * row["paper_counts_attention"]
        flops = [f"{row['gflops']:.1f}", f"{row['attention']:.1f}", *compare(comparable, row["paper_gflops"], "")]
        name = f"{row['detector']}, {row['model']}"
        size = " x ".join(map(str, row["size"]))
        lines.append([name, size, f"{row['parameters']:,}", *released, *flops, row["paper_ap"] or "–"])
    return markdown(["", "image", *counts, "papers' AP, % (not reproduced here)"], lines, numbers=True)


def dense_steps(name: str) -> str:
    """Results of `bench.py segmenters --speed` or `bench.py detectors --speed`: training steps."""
    result = load(name)
    taken = f"fp32, 224 x 224 pixels, batch {result['batch']}, {result['rounds']} rounds of 1 step."
    return f"{source(result)} {taken}\n\n{dense_steps_table(result['steps'])}"


def dense_steps_table(steps: dict[str, dict[str, dict]]) -> str:
    """The result of `segmenters.compare_steps` or `detectors.compare_steps`."""
    lines = []
    for name, ways in steps.items():
        for way, row in ways.items():
            spread = f"{row['min']:.2f} – {row['max']:.2f}"
            lines.append([name, way, f"{row['median']:.2f}", spread, f"{row['ratio']:.2f}", number(row["megabytes"])])
    titles = ["backbone", "", "training, img/s", "min – max", "x", "kept for the backward pass, MB/img"]
    return markdown(titles, lines, numbers=True)


TABLES: dict[str, Callable[[], str]] = {
    "cpu": lambda: model_speeds("performance-cpu", "Not measured yet."),
    "channels-last": lambda: model_speeds("channels-last-cpu", "Not measured yet."),
    "overhead": overhead,
    "predicted": predictions,
    "operators": operators,
    "resources": resources,
    "spills": spills,
    **GPU_TABLES,
    "gpu-model": lambda: model_speeds("gpu-model-training", UNMEASURED),
    "counts": lambda: f"{source(load('models'))}\n\n{count_table(load('models')['counts'])}",
    "speed": speed,
    "segmenters": lambda: dense_counts("segmenters", segmenter_table),
    "segmenter-steps": lambda: dense_steps("segmenters"),
    "detectors": lambda: dense_counts("detectors", detector_table),
    "detector-steps": lambda: dense_steps("detectors"),
    "config": reference,
}
