"""The files that a run writes: strict JSON, and a full disk neither stops training nor tears a line."""

import contextlib
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time

import pytest

from tests.runs import metrics, start
from train.config import load_config
from train.telemetry.appender import Alarm, Appender
from train.telemetry.metrics import Metric, Scores

METRICS = (
    Metric("top1", "top-1", "%", "higher"),
    Metric("top5", "top-5", "%", "higher"),
    Metric("loss", "loss", "", "lower"),
)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "512k"):
        yield folder


@contextlib.contextmanager
def mounted(folder, size):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a file system to fill cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Fill the disk completely; returns the file that does."""
    path = folder / "filler"
    with open(path, "ab", buffering=0) as file:
        with pytest.raises(OSError) as raised:
            while True:
                file.write(bytes(4096))
        assert raised.value.errno == errno.ENOSPC
    return path


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100", None),
        ("", None),
    ],
)
def test_peaks_are_of_the_whole_name(name, tflops):
    from train.engine.flops import peak_flops

    assert peak_flops(name) == (tflops and tflops * 1e12)


def open_monitor(output, config, first=0):
    from train.telemetry.monitor import Monitor

    return Monitor(output, load_config(config), METRICS, "images", True, first, 1000, None)


def train_line(monitor, step, loss=1.0):
    monitor.train(step, step / 8, {"loss": loss}, 1e-3, 0.5, 0.01, 0.1)


def read(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def curve(output):
    """TensorBoard's steps of the loss, as TensorBoard itself reads them."""
    return [scalar.step for scalar in board(output).Scalars("learning/loss")]


def board(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_every_line_ends_with_its_time_and_what_is_not_finite_is_null(tiny_config, tmp_path):
    before = time.time()
    monitor = open_monitor(tmp_path, tiny_config)
    monitor.event("rollback", 3, "back", norms=[1.0, math.inf], to=0, worst={"loss": -math.inf})
    train_line(monitor, 4, loss=math.nan)
    monitor.close()
    after = time.time()
    event, train = (line for line in read(tmp_path / "metrics.jsonl") if line["kind"] != "goodput")
    assert event["norms"] == [1.0, None] and event["worst"] == {"loss": None} and event["to"] == 0
    assert train["loss"] is None and train["step"] == 4 and train["grad_norm"] == 0.5
    for line in (event, train):
        assert list(line)[-1] == "time"
        assert before - 0.001 <= line["time"] <= after + 0.001 and line["time"] == round(line["time"], 3)


def test_a_clock_that_is_set_is_written_down_once(tiny_config, tmp_path, monkeypatch):
    monitor, real = open_monitor(tmp_path, tiny_config), time.time
    train_line(monitor, 1)
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0)
    train_line(monitor, 2)
    train_line(monitor, 3)
    monitor.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [line.get("clock_set") for line in lines] == [None, pytest.approx(-3600.0, abs=0.1), None]


def test_after_a_rollback_a_curve_has_every_step_once(tiny_config, tmp_path):
    monitor = open_monitor(tmp_path, tiny_config)
    for step in (1, 2, 3, 4, 5):
        train_line(monitor, step)
    monitor.event("rollback", 5, "back", steps=[4, 5], to=2)
    for step in (3, 4):
        train_line(monitor, step)
    monitor.close()
    assert curve(tmp_path) == [1, 2, 3, 4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_line_of_the_log_begins_with_its_time_on_a_terminal_too(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monitor = open_monitor(tmp_path, tiny_config)
    monitor.say("said")
    train_line(monitor, 1)
    monitor.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert len(lines) == 2 and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (said|step 1 )", line) for line in lines)


def test_the_progress_bar_goes_back_too(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monitor = open_monitor(tmp_path, tiny_config)
    for _ in range(5):
        monitor.advance()
    monitor.event("rollback", 5, "back", steps=[4, 5], to=2)
    monitor.close()
    assert "2/1000" in sys.stderr.getvalue().split("\r")[-1]


def test_slow_training_is_not_shown_as_none(tiny_config, tmp_path, capsys):
    monitor = open_monitor(tmp_path, tiny_config)
    monitor.train(1, 0.1, {"loss": 1.0}, 1e-3, 0.5, monitor.config.train.global_batch / 0.24, 0.1)
    monitor.close()
    assert "  0.24 img/s  " in capsys.readouterr().out and "  0.24 img/s  " in (tmp_path / "train.log").read_text()


def test_every_chart_of_the_layout_has_its_curves(tiny_config, tmp_path):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    monitor = open_monitor(tmp_path, tiny_config)
    monitor.event("start", 0, "start")
    train_line(monitor, 1)
    for weights in ("model", "ema"):
        monitor.evaluation(1, 0.1, weights, Scores({"top1": 50.0, "top5": 90.0, "loss": 1.0}, 10), seconds=1.0)
    monitor.event("finished", 1, "finished")
    monitor.close()
    events = board(tmp_path)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["learning", "speed", "health"]
    wanted = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    written = events.Tags()["scalars"]
    assert [tag for tag in wanted if not any(re.search(tag, curve) for curve in written)] == ["^speed/mfu$"]  # no GPU
    unseen = {curve for curve in written if not any(re.search(tag, curve) for tag in wanted)}
    assert unseen == {"evaluation/model_top5", "evaluation/ema_top5"}


def test_health_is_counted_over_all_starts(tiny_config, tmp_path):
    monitor = open_monitor(tmp_path, tiny_config)
    monitor.event("start", 0, "start")
    for step in (1, 2):
        monitor.event("skipped_step", step, "skipped")
    monitor.event("bad_sample", 2, "bad")
    train_line(monitor, 2)
    monitor.close()
    time.sleep(1.1)  # a start's event file is named by second and process
    monitor = open_monitor(tmp_path, tiny_config, first=2)
    monitor.event("resume", 2, "resume")
    monitor.event("skipped_step", 3, "skipped")
    train_line(monitor, 3)
    monitor.close()
    events = board(tmp_path)
    curves = {
        name: [point.value for point in events.Scalars(f"health/{name}")]
        for name in ("skipped_steps", "bad_samples", "restarts")
    }
    assert curves == {"skipped_steps": [2, 3], "bad_samples": [1, 1], "restarts": [0, 1]}
    assert [point.value for point in events.Scalars("health/slow_ranks")] == [0, 0]


def test_a_full_disk_tears_no_line_and_loses_none(tiny_config, small_disk, capfd):
    output = small_disk / "run"
    monitor = open_monitor(output, tiny_config)
    for step in range(1, 11):
        train_line(monitor, step)
    filler = fill(small_disk)
    for step in range(11, 111):  # the files' last blocks have room for a few more, and then for half a line
        train_line(monitor, step)
    stderr = capfd.readouterr().err
    assert stderr.count("alarm: ") == 1 and "cannot be written (No space left on device)" in stderr, stderr
    steps = [line["step"] for line in read(output / "metrics.jsonl")]
    assert 10 <= len(steps) < 110 and steps == list(range(1, len(steps) + 1))  # half a line would not have been read

    os.remove(filler)
    train_line(monitor, 111)
    stderr = capfd.readouterr().err
    assert f"{output / 'metrics.jsonl'} is written again; nothing is lost" in stderr
    filler = fill(small_disk)
    for step in range(112, 212):
        train_line(monitor, step)
    assert capfd.readouterr().err.count("alarm: ") == 1, "a second time is said again"
    os.remove(filler)
    monitor.close()
    assert [line["step"] for line in read(output / "metrics.jsonl")] == list(range(1, 212))
    assert [line.split()[3].partition("/")[0] for line in (output / "train.log").read_text().splitlines()] == [
        str(step) for step in range(1, 212)
    ]
    assert curve(output) == list(range(1, 212))


def test_a_disk_that_stays_full_is_said_at_the_end(tiny_config, small_disk, capfd):
    fill(small_disk)
    monitor = open_monitor(small_disk / "run", tiny_config)  # files cannot be created, or stay empty
    for step in range(1, 4):
        train_line(monitor, step)
    monitor.close()
    stderr = capfd.readouterr().err
    assert f"{small_disk / 'run' / 'metrics.jsonl'} could not be written until the end: 3 lines are lost" in stderr, (
        stderr
    )


def test_too_many_kept_lines_lose_the_oldest_which_are_counted(small_disk, capfd):
    lines = [f"line {number:04d}\n".encode() for number in range(1000)]
    file = Appender(small_disk / "file", Alarm(), limit=1000)
    file.write(lines[0])
    filler = fill(small_disk)
    for line in lines[1:]:
        file.write(line)
    os.remove(filler)
    file.write(b"last\n")
    file.close()
    written = (small_disk / "file").read_bytes().splitlines(keepends=True)
    lost = len(lines) + 1 - len(written)
    assert lost > 100 and f"{lost} lines are lost" in capfd.readouterr().err
    assert written == [line for line in lines if line in written] + [b"last\n"]
    assert written[-101:] == [*lines[-100:], b"last\n"]


def test_a_folder_that_cannot_be_written_for_a_while(tmp_path, capfd):
    """Other errors than a full disk: a file in the place of the folder (root may write to read-only folders)."""
    blocker = tmp_path / "run"
    blocker.write_text("")
    file = Appender(blocker / "metrics.jsonl", Alarm())
    file.write(b"1\n")
    assert "alarm: " in capfd.readouterr().err
    blocker.unlink()
    file.write(b"2\n")
    file.close()
    assert (blocker / "metrics.jsonl").read_bytes() == b"1\n2\n"


def test_a_torn_last_line_is_not_continued(tiny_config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    monitor = open_monitor(tmp_path, tiny_config, first=1)
    train_line(monitor, 2)
    monitor.close()
    first, torn, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["step"] == 1 and torn == '{"kind": "tra' and json.loads(second)["step"] == 2


@pytest.mark.slow
def test_a_run_goes_on_while_its_disk_is_full(tiny_config, tmp_path):
    """4 epochs of 8 steps; the disk is full from about step 4 to about step 22. The terminal's output is elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "32m"):
        (disk / "run").mkdir()
        (tmp_path / "stdout").touch()
        (disk / "run" / "stdout_0").symlink_to(tmp_path / "stdout")
        job = start(tiny_config, disk / "run", "train.epochs=4", "train.evaluate_every=0", "checkpoint.every_steps=32")
        wait_for("step 4/32", job)
        filler = fill(disk)
        wait_for("step 22/32", job)
        assert len(metrics(disk / "run", "train")) < 22
        os.remove(filler)
        assert job.wait() == [0], job.text()
        alarms = [line for line in job.text().splitlines() if "alarm: " in line and "samples" not in line]
        assert len(alarms) == 1, alarms
        for name, kind in (("metrics.jsonl", "train"), ("samples/rank_0.jsonl", None)):
            lines = read(disk / "run" / name)
            assert [line["step"] for line in lines if line.get("kind") == kind] == list(range(1, 33))
        assert curve(disk / "run") == list(range(1, 33))


def wait_for(text, job):
    deadline = time.monotonic() + 120
    while text not in job.text():
        assert job.processes[0].is_alive() and time.monotonic() < deadline, job.text()
        time.sleep(0.005)
