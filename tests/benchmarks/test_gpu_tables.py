"""What the tables of docs/performance.md make of the files in docs/results."""

import json

import pytest

from benchmarks import gpu_tables, markdown


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


def test_resume_shows_the_first_step_that_differs(results):
    assert gpu_tables.resume() == gpu_tables.UNMEASURED
    losses = [1 / step for step in range(1, 201)]
    results("gpu-train.json", losses=losses, losses_resumed=losses[:100])
    assert gpu_tables.resume() == "All 100 losses that both runs have are equal to the last bit."
    results("gpu-train.json", losses=losses, losses_resumed=[*losses[:6], losses[6] + 1e-3, *losses[7:100]])
    lines = gpu_tables.resume().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 7", "| 20", "| 100"]
    assert lines[3].endswith("| 1.0e-03 |")


def test_a_run_is_measured_after_its_warm_up(results, tmp_path):
    train = [(1, 10, 9000), (10, 50, 900), (20, 3000, 80), (30, 4000, 60), (40, 3500, 70)]
    lines = [{"kind": "event", "event": "start", "startup_seconds": 12.0}]
    for step, speed, milliseconds in train:
        lines.append(
            {"kind": "train", "step": step, "images_per_second": speed, "step_ms": milliseconds, "data_wait": 0.04}
        )
    lines.append({"kind": "event", "event": "checkpoint", "stall_seconds": 2.5})
    (tmp_path / "train-x-metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        gpu_tables.training_runs().splitlines()[-1] == "| train-x | 3,500 | 3,000 – 4,000 | 70 | 4.0% | 12 | 9 | 2.5 |"
    )


def test_prose_is_wrapped_and_tables_are_not():
    table = f"| {'x ' * 100}|"
    wrapped = markdown.wrapped(f"- {'word ' * 50}\n{table}").splitlines()
    assert wrapped[-1] == table and len(wrapped) == 4
    assert all(len(line) <= 120 for line in wrapped[:-1]) and wrapped[1].startswith("  word")
