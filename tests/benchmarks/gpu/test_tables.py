"""What the tables of docs/gpu.md make of the files in docs/results."""

import json

import pytest

from benchmarks import markdown
from benchmarks.gpu import tables


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty docs/results, and a function that writes a result into it."""
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)

    def write(path, **content):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))

    return write


def test_a_file_in_results_replaces_those_in_folders_and_newer_folders_replace_older_ones(results):
    results("h200-2026-01-01/gpu-a.json", n=1)
    results("h200-2026-01-02/gpu-a.json", n=2)
    results("h200-2026-01-01/gpu-b.json", n=3)
    assert [markdown.load(name)["n"] for name in ("gpu-a", "gpu-b")] == [2, 3]
    results("gpu-a.json", n=4)
    assert markdown.load("gpu-a")["n"] == 4
    assert [path.name for path in markdown.find("gpu-*.json")] == ["gpu-a.json", "gpu-b.json"]
    assert markdown.load("gpu-c") is None


ABOUT = {"command": "c", "date": "d", "machine": "m", "python": "3", "torch": "2", "triton": "3"}


def test_resume_shows_the_first_step_that_differs(results):
    assert tables.resume() == tables.UNMEASURED
    losses = [1 / step for step in range(1, 201)]
    other = [*losses[:6], losses[6] + 1e-3, *losses[7:]]
    rows = [{"family": "cat", "run": "whole", "losses": losses}]
    rows += [{"family": "cat", "run": "killed", "losses": other, "killed_at": 60, "resumed_from": 40}]
    rows += [{"name": "cat, without graphs", "failed": "OutOfMemoryError"}]
    results("gpu-train.json", rows=rows, **ABOUT)
    lines = tables.resume().splitlines()
    assert lines[-3:] == [
        "| cat | whole |  | 200 | none |  |",
        "| cat | killed | killed after 60, resumed from 40 | 200 | 7 | 1.0e-03 |",
        "| cat, without graphs | OutOfMemoryError |  |  |  |  |",
    ]


def test_gradients_that_differ_are_named(results):
    rows = [{"name": "cat, eager", "gradients": 9, "different": []}]
    rows += [{"name": "cat, graphs", "gradients": 9, "different": list("abcd"), "different_from_compiled": ["a"]}]
    results("gpu-exact.json", rows=rows, **ABOUT)
    lines = tables.exact().splitlines()
    assert lines[-2:] == [
        "| cat, eager | 9 | 0 | – |",
        "| cat, graphs | 9 | **4**: `a`, `b`, `c`, … | **1**: `a` |",
    ]


def test_steps_and_recipes_are_listed(results):
    row = {"name": "cat_base, engine, batch 256", "images_per_second": 5301.0, "min": 5200.0, "max": 5400.0, "ms": 48.3}
    results("gpu-model.json", rows=[{**row, "host_ms": 2.5, "peak_gb": 23.4, "reserved_gb": 22.0}], **ABOUT)
    line = "| cat_base, engine, batch 256 | 5,301 | 5,200 – 5,400 | 48.3 | 2.5 | 23.4 | 22 |"
    assert tables.steps("gpu-model").splitlines()[-1] == line
    costs = {"kind": "time", "images": 128, "size": 224, "recipe": "default", "way": "kernels"}
    costs |= {"launches": 9.0, "kernel_ms": 0.71, "host_ms": 1.4, "together_ms": 1.5}
    results("gpu-recipe.json", rows=[{"kind": "equal", "largest": 0.1}, costs], **ABOUT)
    assert tables.recipe().splitlines()[-1] == "| 128 x 224 | default | kernels | 9 | 0.71 | 1.4 | 1.5 |"


def test_a_run_is_measured_after_its_warm_up(results, tmp_path):
    train = [(1, 10, 9000), (10, 50, 900), (20, 3000, 80), (30, 4000, 60), (40, 3500, 70)]
    lines = [{"kind": "event", "event": "start", "startup_seconds": 12.0}]
    for step, speed, milliseconds in train:
        lines.append(
            {"kind": "train", "step": step, "images_per_second": speed, "step_ms": milliseconds, "data_wait": 0.04}
        )
    lines.append({"kind": "event", "event": "checkpoint", "stall_seconds": 2.5})
    (tmp_path / "train-x-metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tables.training_runs().splitlines()[-1] == "| train-x | 3,500 | 3,000 – 4,000 | 70 | 4.0% | 12 | 9 | 2.5 |"


def test_prose_is_wrapped_and_tables_are_not():
    table = f"| {'x ' * 100}|"
    wrapped = markdown.wrapped(f"- {'word ' * 50}\n{table}").splitlines()
    assert wrapped[-1] == table and len(wrapped) == 4
    assert all(len(line) <= 120 for line in wrapped[:-1]) and wrapped[1].startswith("  word")


def test_the_hosts_time_of_calls_and_passes(results):
    step = {"forward_ms": 40.0, "backward_ms": 60.0, "device_ms": 35.0, "launches": 1200.0}
    rows = [{"kind": "call", "name": "pack", "us": 20.0}, {"kind": "step", "name": "cat_base", **step}]
    results("gpu-host.json", rows=[*rows, {"kind": "function", "name": "a.py:1 f", "us": 1.0}], **ABOUT)
    assert tables.host().splitlines()[-2:] == [
        "| `pack` | 20 µs |  |",
        "| cat_base | forward 40 ms, backward 60 ms | 35 ms in 1,200 launches |",
    ]
