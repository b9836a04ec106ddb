"""Counting of the bytes that a model moves, and the roofline's bound."""

import torch

from benchmarks.roofline import Roofline, bytes_per_image, count_bytes
from catmodel import kernels


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


def test_the_mlps_bytes_are_those_of_its_table():
    """catmodel/kernels/mlp.py: 10 C elements a token in inference, and in training 14 C forward and 24 C backward."""
    C, w1, b1 = 16, *(torch.empty(64, *shape, device="meta", requires_grad=True) for shape in ((16,), ()))
    w2 = torch.empty(C, 64, device="meta", requires_grad=True)

    def of_a_token(step) -> float:
        inputs = (torch.empty(n, C, device="meta", requires_grad=True) for n in (2, 3))
        two, three = (count_bytes(lambda x=x: step(x)) for x in inputs)
        return sum(three[name] - two[name] for name in three if name.startswith("catmodel::")) / 4

    def infer(x):
        with torch.no_grad():
            kernels.ops.mlp(x, w1, b1, w2, None, False)

    def forward(x):
        return kernels.ops.mlp(x, w1, b1, w2, None, True)[0]

    def train(x):
        torch.autograd.grad(forward(x), (x, w1, b1, w2), torch.empty_like(x))

    assert [of_a_token(step) / C for step in (infer, forward, train)] == [10, 14, 14 + 24]


def test_the_floor_is_set_by_what_is_slower():
    device = Roofline(bandwidth=100.0, flops=1000.0)
    assert device.floor(flops=10.0, moved=10.0) == 10.0
    assert device.floor(flops=200.0, moved=10.0) == 5.0
