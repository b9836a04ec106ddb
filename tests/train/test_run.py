"""The door for Python: `from train import run`."""

import json
import shutil
import subprocess
import sys

import pytest

import train
from tests.runs import ROOT, events, losses, metrics, run
from train.config import ConfigError

SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
import train
from train.guard.errors import Stopped
from train.guard.signals import stop_signals
from tests.faults import SignalIn

assert "torch" not in sys.modules
before = signal.getsignal(signal.SIGINT)
settings = ["train.evaluate_every=0", "train.max_steps=2"]
assert str(train.run({config!r}, settings, output={output!r})) == {output!r}
train.run({config!r}, [*settings, "train.max_steps=4"], output={output!r})
stop_signals.install()
stop_signals.uninstall()
threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    train.run({config!r}, ["train.epochs=1000"], output={output!r} + "-stopped")
except Stopped as stopped:
    print("stopped:", stopped)
assert signal.getsignal(signal.SIGINT) == before

# An impatient user: the second ctrl-C, while the run saves for the first one, is a KeyboardInterrupt.
SignalIn(0, signal.SIGINT, "step", 2)(0)
SignalIn(0, signal.SIGINT, "save", 1)(0)
try:
    train.run({config!r}, [*settings, "train.max_steps=90", "guard.grace=4"], output={output!r} + "-interrupted")
except KeyboardInterrupt:
    print("interrupted")
    time.sleep(6)  # longer than the grace that the first one had

import gc
import torch
from train.engine.deepspeed_engine import Engine

gc.collect()
assert not torch.distributed.is_initialized() and "saver" not in [thread.name for thread in threading.enumerate()]
assert not [thing for thing in gc.get_objects() if isinstance(thing, Engine)], "the networks of former runs"
print("nothing is left")
"""


@pytest.mark.slow
def test_runs_follow_each_other_in_one_process(tiny_config, tmp_path):
    script = SCRIPT.format(root=str(ROOT), config=str(tiny_config), output=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4] and len(events(tmp_path / "run", "resume")) == 1
    assert "stopped: stopped after step" in done.stdout and "rank 0 got SIGINT" in done.stdout
    assert done.stdout.endswith("interrupted\nnothing is left\n"), done.stdout


def test_a_folder_that_cannot_be_made_is_named(tiny_config, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/run"):
        with pytest.raises(ConfigError, match=f"{folder} cannot be written .*choose another --output"):
            train.run(tiny_config, output=tmp_path / folder)


def test_a_run_on_a_dataset_without_val_says_that_it_is_not_evaluated(tiny_dataset, tiny_config, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    job = run(tiny_config, tmp_path / "run", f"data.path={dataset}", "train.max_steps=2")
    assert "the dataset has no val split, so the run is not evaluated" in job.text()
    assert metrics(tmp_path / "run", "eval", missing_ok=True) == []
