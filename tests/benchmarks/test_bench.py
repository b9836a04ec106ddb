"""launch/bench.py model and kernels, and launch/gpu.py, as commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.model import Setting, one_step
from tests.benchmarks.test_roofline import Linear

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_bench_of_a_model_measures_each_way_and_says_what_the_page_needs(tmp_path):
    path = tmp_path / "cpu.json"
    sizes = (
        "--models",
        "cat_nano",
        "--ways",
        "ours,released,channels_last",
        "--mode",
        "training",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--steps",
        "1",
    )
    done = command("launch/bench.py", "model", *sizes, "--profile", str(tmp_path / "traces"), "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    rows = result["models"]["cat_nano"]["training"]["rows"]
    assert rows["released"]["ratio"] == 1
    # Recomputation and copies: more bytes for the same arithmetic.
    assert rows["released"]["megabytes"] > 1.1 * rows["ours"]["megabytes"]
    assert rows["released"]["gflops"] == rows["ours"]["gflops"]
    assert set(rows) == {"ours", "released", "ours, channels-last"}
    for row in rows.values():
        assert (
            row["median"] > 0
            and 0 < row["mfu"] < 1
            and set(row["milliseconds"]) == {"forward", "backward", "optimizer"}
        )
    assert result["machine"] and result["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "traces/cat_nano-training.json").read_text())["traceEvents"]
    assert any("mm" in row["name"] for row in result["models"]["cat_nano"]["training"]["profile"])


@pytest.mark.slow
def test_what_a_model_of_each_family_moves_on_a_gpu_is_counted(tmp_path):
    path, models = tmp_path / "counts.json", ["cat_tiny", "pvt_small", "cotnet50"]
    sizes = (
        "--count-only",
        "--models",
        ",".join(models),
        "--ways",
        "ours,plain,channels_last",
        "--mode",
        "training",
        "--json",
        str(path),
    )
    done = command("launch/bench.py", "model", *sizes)
    assert done.returncode == 0, done.stderr
    for model in models:
        rows = json.loads(path.read_text())["models"][model]["training"]["rows"]
        assert rows["ours"]["gflops"] == rows["plain"]["gflops"] == rows["ours, channels-last"]["gflops"] > 2
        assert rows["ours"]["megabytes"] < rows["plain"]["megabytes"]


TOO_SMALL = "--batch 1 is too small to train cotnet50: its batch norms need 2 images"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("model --models cat_huge", "--models cat_huge: known are cat_base, cat_nano"),
        ("model --models cat_nano,cotnet50 --batch 1", TOO_SMALL),
        ("models --speed --batch 1", TOO_SMALL),
        ("segmenters --speed --batch 1", TOO_SMALL),
        ("detectors --speed --batch 1", TOO_SMALL),
        ("model --batch -1", "'-1' is not a whole number of at least 1"),
        ("model --steps 0", "'0' is not a whole number of at least 1"),
        ("model --rounds 0", "'0' is not a whole number of at least 1"),
        ("data --images 0", "'0' is not a whole number of at least 1"),
        ("data --gpu-rate 0", "'0' is not a number of at least 1"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_measured(arguments: str, sentence: str):
    done = command("launch/bench.py", *arguments.split())
    assert (done.returncode, done.stdout) == (78, "")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["launch/gpu.py"], ["launch/bench.py", "kernels"]], ids=["gpu", "kernels"])
def test_what_needs_a_gpu_says_so_in_one_sentence(arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (78, "")
    assert "GPU" in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_step_is_a_training_step():
    torch.manual_seed(0)
    model = Linear()
    torch.nn.init.normal_(model.weight, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = Setting(torch.device("cpu"), torch.float32, 8, True).images(8, 4, torch.device("cpu"))

    def loss() -> float:
        return torch.nn.functional.cross_entropy(model(images), labels).item()

    before = loss()
    one_step(model, training=True, optimizer=optimizer)(images, labels)
    assert loss() < before
