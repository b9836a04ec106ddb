"""A run's folder belongs to one run at a time, and its files' permissions follow the umask."""

import os
from dataclasses import dataclass

import pytest

from tests.runs import events, metrics, run, start


@dataclass(frozen=True)
class Umask:
    mask: int

    def __call__(self, rank: int) -> None:
        os.umask(self.mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_all_files_respect_the_umask(tiny_config, tmp_path, mask):
    output = tmp_path / "run"
    run(tiny_config, output, "train.max_steps=2", "monitor.images=8", world=2, before=Umask(mask))
    paths = [path for path in output.rglob("*") if not path.name.startswith("stdout_")]
    assert {".lock", "manifest.json", "shard_00001.safetensors", "model.safetensors", "metrics.jsonl"} <= {
        path.name for path in paths
    }
    for path in paths:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask, path


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(tiny_config, tmp_path):
    first = start(tiny_config, tmp_path, "train.epochs=30", "train.evaluate_every=0", world=2)
    while not metrics(tmp_path, "train", missing_ok=True):
        assert first.processes[0].is_alive()
    taken = max(line["step"] for line in metrics(tmp_path, "train"))
    second = start(tiny_config, tmp_path, "train.epochs=30", world=1)
    assert second.wait() == [78]
    said = [line for line in second.text().splitlines() if line.startswith("error: ")]
    assert (
        len(said) == 1
        and f"{tmp_path} is in use by a run on host " in said[0]
        and f"process {first.processes[0].pid}" in said[0]
    )
    assert said[0].endswith("wait for it, stop it, or choose another --output")
    assert first.wait() == [0, 0]
    assert max(line["step"] for line in metrics(tmp_path, "train")) == 240 > taken
    assert len(events(tmp_path, "start")) == 1
