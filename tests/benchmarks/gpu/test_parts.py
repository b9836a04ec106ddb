"""launch/gpu.py without a GPU: rows on disk at once, jobs in processes with limits, and what is said of the rows."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import launch.gpu
from benchmarks.gpu import cifar, exact, host, model, runs, small
from benchmarks.gpu.parts import CALLS, NEED_IMAGES, OURS, PARTS, SWIN
from benchmarks.gpu.record import Record, Session
from benchmarks.gpu.run import CannotMeasure
from benchmarks.graphs import device_seconds
from benchmarks.graphs import record as record_graph
from benchmarks.photographs import draw_photographs, repeat

ROOT = Path(__file__).resolve().parents[3]


def passes(rows: list[dict]) -> tuple[bool, str]:
    return all(row["good"] for row in rows), f"{rows[-1]['good']}"


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "gpu-x.json", passes)


def test_a_row_is_on_disk_when_it_is_measured_and_a_part_passes_when_all_its_jobs_have_finished(record):
    record.begin(["one", "two"])
    assert record.read()["rows"] == [] and not record.read()["passed"]
    record.add(name="a", good=True)
    other = Record(record.path, passes)  # another job's process
    other.add(name="b", good=True)
    found = record.read()
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    assert not found["passed"] and found["says"] == "True; one: not finished; two: not finished"
    record.finish("one")
    other.finish("two", "not done after 30 s")
    assert not record.read()["passed"] and record.read()["says"] == "True; two: not done after 30 s"
    other.finish("two")
    found = record.read()
    assert found["passed"] and found["says"] == "True" and found["machine"] and found["seconds"] >= 0


def test_a_measurement_that_fails_becomes_a_row_and_the_part_does_not_pass(record):
    record.begin(["one"])
    record.measure("first", lambda: {"good": True})
    record.measure("second", lambda: {"good": 1 / 0}, batch=3)
    record.finish("one")
    found = record.read()
    assert found["rows"][1] == {"name": "second", "batch": 3, "failed": "ZeroDivisionError: ['division by zero']"}
    assert not found["passed"] and found["says"] == "True; second failed"


def test_the_parts_are_what_they_say():
    assert set(NEED_IMAGES) < set(PARTS)
    assert set(exact.FAMILIES) == set(PARTS["exact"].jobs) == set(runs.RECIPES) == set(PARTS["train"].jobs)
    for part in PARTS.values():
        assert part.limit <= 600
        for later in [*part.jobs.values(), part.judge]:
            assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{later.module}"), later.name))


def gradients(loss: float, **values: float) -> exact.Pass:
    return exact.Pass(loss, {name: torch.tensor([value]) for name, value in values.items()})


def test_exact_names_the_gradients_that_differ():
    same, other_seed = gradients(1.0, a=1, b=2), gradients(3.0, a=3, b=4)
    row = exact.described([same, same, gradients(1.0, a=1, b=2.5), other_seed], None)
    assert row["different"] == ["b"] and row["other_seed_differs"]
    rows = [{"name": "cat, eager", "family": "cat", **row}]
    assert exact.judge(rows) == (False, "cat, eager: 1 of 2 differ between passes: b")
    good = exact.described([same, same, other_seed], [same, same, other_seed])
    assert exact.judge([{"name": "cat, graphs", "family": "cat", **good}])[0]
    moved = exact.described([same, same, other_seed], [gradients(1.1, a=1, b=2), other_seed])
    assert moved["different_from_compiled"] == ["loss"]
    zero = gradients(1.0, a=0, b=2)
    assert exact.lost(zero, same) == ["a"] and exact.lost(same, zero) == exact.lost(zero, zero) == []
    said = exact.judge([{"name": "cat, compiled", "family": "cat", **good, "lost": ["a"]}])
    assert said == (False, "cat, compiled: 1 of 2 are zero, and not eager: a")
    still = exact.described([same, same, same], None)
    assert "do not follow the seed" in exact.judge([{"name": "cat, graphs", "family": "cat", **still}])[1]


def rows_of(killed: list[float], without: list[float], weights: str = "w") -> list[dict]:
    whole = [float(step) for step in range(1, 11)]
    killed_row = {"losses": killed, "before": whole[:6], "weights": weights, "killed_at": 6, "resumed_from": 4}
    rows = {"whole": {"losses": whole, "weights": "w"}, "killed and resumed": killed_row}
    rows["without graphs"] = {"losses": without, "weights": "w"}
    return [{"family": "cat", "run": name, **row} for name, row in rows.items()]


def test_train_says_at_which_step_losses_differ_first():
    whole = [float(step) for step in range(1, 11)]
    assert runs.judge(rows_of(whole, whole)) == (
        True,
        "cat, 10 steps: killed and resumed (killed after 6, resumed from 4) equal, without graphs equal",
    )
    passed, said = runs.judge(rows_of(whole, [*whole[:2], 3.5, *whole[3:]]))
    assert not passed and said.endswith("without graphs DIFFERS from step 3 on")
    assert "resumed from 4) DIFFERS from step 9 on" in runs.judge(rows_of(whole[:8], whole))[1]
    assert "resumed from 4) other WEIGHTS" in runs.judge(rows_of(whole, whole, weights="v"))[1]
    rows = rows_of(whole, whole)
    rows[1]["before"] = [1.0, 2.5]
    passed, said = runs.judge(rows)
    assert not passed and "DIFFERS before the kill from step 2 on" in said


def test_the_models_speed_is_said_beside_the_aims():
    def row(model: str, way: str, batch: int, speed: float) -> dict:
        return {"model": model, "way": way, "batch": batch, "images_per_second": speed}

    rows = [row(OURS, "engine", 256, 5300.0), row(OURS, "graphs", 256, 5400.0), row(SWIN, "graphs", 256, 2700.0)]
    rows += [row(OURS, "eager", 128, 1800.0), row(OURS, "plain", 128, 1500.0)]
    rows += [row(OURS, "compiled", 256, 3300.0), row(OURS, "plain compiled", 256, 3000.0)]
    assert model.judge(rows) == (
        True,
        "cat_base, batch 256: 5,400 images/s (aim 5,200), 2.00 x Swin-S, eager 1.20 x plain eager (aim 1.3), "
        "compiled 1.10 x plain compiled (aim 1)",
    )
    assert model.judge(rows[2:3])[0] is False


def test_cifars_last_evaluation_is_said():
    rows = [
        {"name": f"step {step}, {weights}", "step": step, "top1": top1, "seconds": step / 50}
        for step, weights, top1 in ((7500, "ema", 96.0), (15000, "model", 95.1), (15000, "ema", 95.4))
    ]
    assert cifar.judge(rows) == (True, "step 15000, ema: 95.40 % top-1 (aim 95) after 300 s")


def test_a_recorded_call_computes_again_and_is_timed():
    calls = []
    result, replay = record_graph(lambda: calls.append(len(calls)) or len(calls), torch.device("cpu"))
    assert result == 1 and replay() == 2
    assert device_seconds(lambda: time.sleep(0.001), torch.device("cpu"), rounds=3) >= 0.001


def test_photographs_are_linked_until_there_are_enough(tmp_path):
    draw_photographs(tmp_path / "drawn", 12, (40, 30), processes=1)
    repeat(tmp_path / "drawn", tmp_path / "many", 30)
    links = sorted((tmp_path / "many").rglob("*.jpg"))
    assert len(links) == 30 and len({path.parent for path in links}) == 30
    contents = {path.read_bytes() for path in links}
    assert contents == {path.read_bytes() for path in (tmp_path / "drawn").rglob("*.jpg")} and len(contents) == 12
    with pytest.raises(ValueError, match="has no JPEGs"):
        repeat(tmp_path / "none", tmp_path / "other", 3)


def test_parts_that_need_images_do_not_wait_for_what_cannot_be_prepared(tmp_path):
    (tmp_path / "empty").mkdir()
    session = Session(tmp_path, tmp_path, tmp_path / "cache", images=tmp_path / "empty", rehearsal=True)
    with pytest.raises(ValueError, match="has no JPEGs"):
        small.draw(session)
    with pytest.raises(RuntimeError, match="there is no dataset: .* has no JPEGs"):
        session.wait_for_dataset()


@pytest.mark.slow
def test_two_parts_rehearsed(tmp_path):
    command = [sys.executable, "launch/gpu.py", "--rehearse", "--parts", "loader,whole", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--cache", str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"gpu-{name}.json").read_text()) for name in ("loader", "whole")}
    assert all(part["passed"] for part in found.values())
    assert found["loader"]["rows"][-1]["cores"] == 1 and found["loader"]["rows"][-1]["images_per_second"] > 0
    assert found["whole"]["rows"][0]["images_per_second"] > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_parts_rehearsed(tmp_path):
    names = [name for names in CALLS.values() for name in names]
    command = [sys.executable, "launch/gpu.py", "--rehearse", "--parts", ",".join(names), "--output", str(tmp_path)]
    done = subprocess.run([*command, "--cache", str(tmp_path / "c")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert json.loads((tmp_path / f"gpu-{name}.json").read_text())["passed"], name
    assert len(json.loads((tmp_path / "gpu-profile.json").read_text())["rows"]) > 10


def test_runs_on_cifar_need_their_dataset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "cifar10_100,bits"])
    with pytest.raises(CannotMeasure, match="^--parts cifar10_100,bits: add --cifar DATASET"):
        launch.gpu.main(launch.gpu.parse_arguments())


@pytest.mark.long
def test_cifar_rehearsed(tiny_dataset, tmp_path):
    command = [sys.executable, "launch/gpu.py", "--rehearse", "--parts", "cifar10_100", "--output", str(tmp_path)]
    command += ["--cifar", str(tiny_dataset), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-cifar10_100.json").read_text())
    assert found["passed"] and [row["step"] for row in found["rows"]] == [13, 13]
    assert (tmp_path / "train-cifar10_100-metrics.jsonl").exists()


def test_functions_of_a_forward_pass_by_their_own_time():
    def inner() -> int:
        return sum(range(200_000))

    found = host.functions(lambda: [inner() for _ in range(3)], repeats=2)
    assert found[0]["name"].endswith("<built-in method builtins.sum>") and found[0]["calls"] == 3
    own = next(row for row in found if row["name"].endswith(" inner"))
    assert own["name"].startswith("tests/benchmarks/gpu/test_parts.py:") and own["with_callees_us"] > own["us"]
