"""python launch/goodput.py RUN, as a user types it."""

import json
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

RESUME = {"kind": "event", "event": "resume", "step": 10, "startup_seconds": 10.0}
# A start that hangs, one that is killed, and one that goes on.
LINES = [
    {"kind": "event", "event": "start", "step": 0, "startup_seconds": 10.0, "world_size": 4, "time": 3610.0},
    {"kind": "train", "step": 1, "step_ms": 1000.0, "data_wait": 0.0, "time": 3611.0},
    {"kind": "train", "step": 10, "step_ms": 1000.0, "data_wait": 0.0, "time": 3620.0},
    {**RESUME, "world_size": 4, "down_seconds": 10.0, "time": 3700.0},
    {"kind": "train", "step": 11, "step_ms": 1000.0, "data_wait": 0.0, "time": 3701.0},
    {"kind": "train", "step": 20, "step_ms": 1000.0, "data_wait": 0.0, "time": 3710.0},
    {**RESUME, "world_size": 2, "lost_steps": 10, "time": 3730.0},
    {"kind": "train", "step": 11, "step_ms": 1000.0, "data_wait": 0.0, "time": 3731.0},
    {"kind": "train", "step": 20, "step_ms": 1000.0, "data_wait": 0.0, "time": 3740.0},
]
SECONDS = {"productive": 20.0, "startup": 30.0, "lost": 70.0, "waiting": 20.0, "other": 60.0}


def command(*arguments):
    environment = {**os.environ, "TZ": "UTC"}
    words = [sys.executable, str(ROOT / "launch" / "goodput.py"), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"kind": "tra')
    (tmp_path / "stacks").mkdir()
    hang = "1970-01-01 01:01:20 +0000 rank 2 has been 60 s in step 11 (limit 60 s).\n"
    (tmp_path / "stacks" / "rank_2.txt").write_text(hang)
    (tmp_path / ".lock").write_text('{"beat": 3800.0}')
    return tmp_path


def test_the_table(finished):
    result = command(str(finished))
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{finished}: 10.0% of 0:03:20 was productive"
    assert lines[1] == "2 restarts, 10 steps lost"
    rows = [line.split() for line in lines]
    assert ["productive", "0:00:20", "10.0"] in rows and ["lost", "0:01:10", "35.0"] in rows
    assert ["data", "wait", "0:00:00", "0.0"] in rows
    assert ["1", "1970-01-01", "01:00:00", "4", "0", "to", "10", "hung"] in rows
    assert ["2", "1970-01-01", "01:01:30", "4", "10", "to", "20", "killed"] in rows
    assert rows[-1][:9] == ["3", "1970-01-01", "01:02:00", "2", "10", "to", "20", "none", "yet:"]


def test_a_stop_has_the_name_that_watch_gives_it(finished):
    with open(finished / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"kind": "event", "event": "preempted", "step": 20, "time": 3790.0}) + "\n")
    assert command(str(finished)).stdout.split()[-1] == "stopped"


def test_json(finished):
    result = command(str(finished), "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["goodput"] == pytest.approx(0.1) and summary["total"] == pytest.approx(200.0)
    assert {category: seconds for category, seconds in summary["seconds"].items() if seconds} == pytest.approx(SECONDS)
    assert (summary["restarts"], summary["lost_steps"], summary["lines_left_out"]) == (2, 10, 0)
    assert [start["end"] for start in summary["starts"]] == ["hung", "killed", None]
    assert summary["starts"][2] == {"time": 3720.0, "world_size": 2, "first_step": 10, "last_step": 20, "end": None}


def test_mistakes_get_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text('{"kind": "event", "event": "start", "step": 0}\n')
    for name, code, sentence in (
        ("nowhere", 78, "is not a run's folder"),
        ("empty", 65, "metrics.jsonl cannot be read (No such file or directory)"),
        ("old", 65, "has no start with a time"),
    ):
        result = command(str(tmp_path / name))
        assert result.returncode == code
        assert result.stderr.startswith("error: ") and sentence in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


def test_torch_is_not_imported(finished):
    code = (
        f"import runpy, sys; sys.argv = ['goodput', {str(finished)!r}]\n"
        "try: runpy.run_path('launch/goodput.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
