"""The published recipes on real photographs, as a user starts them."""

import subprocess
import sys

import pytest

from tests.runs import ROOT, metrics

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="needs ../shared/data/imagenet_sample.tar: 800 ImageNet photographs")
def test_cat_b_takes_steps_on_full_size_photographs(tmp_path):
    """configs/cat_b.yaml with nothing replaced but the dataset, the batch sizes and the number of steps."""
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    subprocess.run([sys.executable, "launch/prepare.py", str(PHOTOGRAPHS), str(dataset)], cwd=ROOT, check=True, capture_output=True)
    settings = [f"data.path={dataset}", "train.global_batch=4", "train.micro_batch=2", "train.max_steps=2"]
    command = [sys.executable, "launch/train.py", "--config", "configs/cat_b.yaml", "--output", str(run), *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(6 < line["loss"] < 8 for line in lines)  # 800 classes, the first two steps: about log(800) = 6.7
    assert (run / "model.safetensors").stat().st_size > 4 * 51e6
