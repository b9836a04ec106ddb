"""The ways that `bench.py kernels` times compute the same."""

import pytest
import torch

from benchmarks.kernels import Workload, workloads

WAYS = {
    "inner-patch attention": {"kernel", "kernel, bias apart", "kernel, drop-path"},
    "cross-patch attention": {"kernel", "kernel, packed", "kernel, drop-path"},
    "residual and norm": {"kernel", "kernel, drop-path"},
    "MLP": {"kernel"},
}


@pytest.fixture
def device(monkeypatch) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")


def outcome(workload: Workload, way: str) -> list[torch.Tensor]:
    """The results, and the gradients of what is trained."""
    torch.manual_seed(1)  # for dropout
    results = workload.ways[way](*workload.tensors)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [torch.randn_like(result) for result in results]
    return [*(one.detach() for one in results), *torch.autograd.grad(results, workload.trained, gradients)]


def test_all_ways_with_kernels_give_the_same_results_and_gradients(device):
    found = list(workloads(device, torch.float16, 1, compiled=False, stages=((7, 16, 1, False),)))
    assert [workload.name for workload in found] == list(WAYS)
    for workload in found:
        assert set(workload.ways) == WAYS[workload.name] | {"plain"}
        expected = outcome(workload, "kernel")
        for way in WAYS[workload.name]:
            for one, other in zip(outcome(workload, way), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
