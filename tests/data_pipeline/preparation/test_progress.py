"""The progress of a long command, on a terminal and elsewhere, and its durations."""

import io
import sys
import time

import pytest

from data_pipeline.formatting import duration
from data_pipeline.preparation import progress
from data_pipeline.preparation.progress import Progress


@pytest.mark.parametrize(
    ("unit", "total", "first", "done", "seconds", "line"),
    [
        ("images", 1000, 0, 250, 10, "packing: 250 of 1000 images, 25 images/s, 30 s left"),
        (
            "images",
            1_281_167,
            500_000,
            600_000,
            250,
            "packing: 600000 of 1281167 images, 400 images/s, 28 min 23 s left",
        ),
        ("bytes", 140_000_000_000, 0, 10_500_000_000, 300, "packing: 10.5 of 140.0 GB, 35 MB/s, 1 h 01 min left"),
        ("files", None, 0, 40_000, 20, "packing: 40000 files, 2000 files/s"),
        ("images", 1000, 300, 300, 10, "packing: 300 of 1000 images, 0 images/s, time left unknown"),
    ],
)
def test_lines(unit, total, first, done, seconds, line):
    assert Progress(unit, "packing", total, first).line(done, seconds) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (48 * 3600 - 60, "47 h 59 min"),
        (48 * 3600, "2 d 00 h"),
        (100 * 3600, "4 d 04 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_at_every_interval_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    with Progress("images", "packing", 10) as shown:
        shown.show(4)
        shown.show(8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["packing: 4 of 10 images", "packing: 8 of 10 images"]
    with Progress("images", "packing", 10) as shown:
        shown.next_line = shown.start + 1000
        shown.show(4)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("images", "packing", 10, 2) as shown:
        time.sleep(1.1)  # shorter work shows no bar
        shown.show(7)
    text = sys.stderr.getvalue()
    assert "packing:" in text and "7/10" in text and "images/s" in text
