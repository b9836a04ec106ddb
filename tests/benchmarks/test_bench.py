"""launch/bench.py model and kernels, and launch/gpu.py, as commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.model import Setting, one_step
from benchmarks.roofline import Roofline, bytes_per_image, count_bytes

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


def test_mistakes_are_one_sentence():
    done = command("launch/bench.py", "model", "--models", "cat_huge")
    assert (done.returncode, done.stdout) == (78, "")
    assert "cat_huge" in done.stderr and "cat_tiny" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["launch/gpu.py"], ["launch/bench.py", "kernels"]], ids=["gpu", "kernels"])
def test_what_needs_a_gpu_says_so_in_one_sentence(arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (78, "")
    assert "GPU" in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


class Linear(torch.nn.Module):
    """A linear layer from 3 x 4 x 4 inputs to 10 outputs, without bias."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(10, 48))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def test_bytes_of_a_product_are_those_of_its_factors_and_its_result():
    a, b = torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta")
    assert count_bytes(lambda: a @ b).total() == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert count_bytes(lambda: a.view(16, 8).t()).total() == 0
    assert count_bytes(lambda: b.add_(1)).total() == 2 * b.nbytes
    assert count_bytes(lambda: a + torch.empty(1, 16, device="meta").expand(8, 16)).total() == 4 * (2 * 8 * 16 + 16)


def test_a_large_batch_shares_the_weights_bytes():
    model = Linear().to("meta")
    run = lambda n: model(torch.empty(n, 3, 4, 4, device="meta"))  # noqa: E731
    assert bytes_per_image(run, 4).total() == count_bytes(lambda: run(4)).total() / 4 == 4 * (48 + 10) + 4 * 480 / 4


def test_fused_attention_counts_its_inputs_and_its_result_alone():
    q, k, v = (torch.empty(2, 3, 49, 32, device="meta", requires_grad=True) for _ in range(3))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert count_bytes(attend).total() == 4 * q.nbytes
    # Back: those four and the gradients of all of them.
    assert (
        count_bytes(lambda: torch.autograd.grad(attend(), (q, k, v), torch.empty_like(q))).total() == (4 + 8) * q.nbytes
    )


def test_the_floor_is_set_by_what_is_slower():
    roofline = Roofline(bandwidth=100.0, flops=1000.0)
    assert roofline.floor(flops=10.0, moved=10.0) == 10.0
    assert roofline.floor(flops=200.0, moved=10.0) == 5.0


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
