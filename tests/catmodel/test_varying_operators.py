"""`test_generated_code.Varying` records what `torch.use_deterministic_algorithms` would replace or refuse."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.catmodel.test_generated_code import Varying

INDEX = torch.tensor([0, 1, 1, 3])


def values(*shape: int) -> Tensor:
    return torch.rand(shape, requires_grad=True)


def zeros() -> Tensor:
    return torch.zeros(4)


def put() -> Tensor:
    return zeros().put_(INDEX, torch.ones(4), accumulate=True)


def unpool(dims: int) -> Tensor:
    sides = (4,) * dims
    pool, back = getattr(F, f"max_pool{dims}d"), getattr(F, f"max_unpool{dims}d")
    return back(*pool(values(1, 2, *sides), 2, return_indices=True), 2)


def pad(mode: str, dims: int) -> Tensor:
    return F.pad(values(1, 2, *(4,) * dims), (1, 1) * dims, mode)


# By the names in the documentation of `torch.use_deterministic_algorithms`.
CALLS = {
    "torch.nn.ReplicationPad1d": lambda: pad("replicate", 1),
    "torch.nn.ReplicationPad2d": lambda: pad("replicate", 2),
    "torch.nn.ReplicationPad3d": lambda: pad("replicate", 3),
    "torch.nn.ReflectionPad1d": lambda: pad("reflect", 1),
    "torch.nn.ReflectionPad2d": lambda: pad("reflect", 2),
    "torch.nn.ReflectionPad3d": lambda: pad("reflect", 3),
    "torch.cumsum": lambda: values(4).cumsum(0),
    "torch.Tensor.__getitem__": lambda: values(4)[INDEX],
    "torch.Tensor.index_put": lambda: zeros().index_put((INDEX,), values(4)),
    "torch.Tensor.put_": put,
    "torch.Tensor.scatter_add_": lambda: zeros().scatter_add_(0, INDEX, values(4)),
    "torch.gather": lambda: values(4).gather(0, INDEX),
    "torch.index_add": lambda: zeros().index_add(0, INDEX, values(4)),
    "torch.index_select": lambda: values(4).index_select(0, INDEX),
    "torch.repeat_interleave": lambda: values(4).repeat_interleave(INDEX),
    "torch.Tensor.index_copy": lambda: zeros().index_copy(0, INDEX, values(4)),
    "torch.Tensor.index_reduce": lambda: zeros().index_reduce(0, INDEX, torch.ones(4), "mean"),
    "torch.Tensor.scatter": lambda: zeros().scatter(0, INDEX, values(4)),
    "torch.Tensor.scatter_reduce": lambda: zeros().scatter_reduce(0, INDEX, values(4), "sum"),
    "torch.nn.Embedding": lambda: F.embedding(INDEX, values(4, 2)),
    "torch.nn.EmbeddingBag": lambda: F.embedding_bag(INDEX[None], values(4, 2), mode="max"),
    "torch.nn.MaxPool2d": lambda: F.max_pool2d(values(1, 2, 4, 4), 2),
    "torch.nn.MaxPool3d": lambda: F.max_pool3d(values(1, 2, 4, 4, 4), 2),
    "torch.nn.AvgPool3d": lambda: F.avg_pool3d(values(1, 2, 4, 4, 4), 2),
    "torch.nn.AdaptiveAvgPool2d": lambda: F.adaptive_avg_pool2d(values(1, 2, 4, 4), 3),
    "torch.nn.AdaptiveAvgPool3d": lambda: F.adaptive_avg_pool3d(values(1, 2, 4, 4, 4), 3),
    "torch.nn.AdaptiveMaxPool2d": lambda: F.adaptive_max_pool2d(values(1, 2, 4, 4), 3),
    "torch.nn.FractionalMaxPool2d": lambda: F.fractional_max_pool2d(values(1, 2, 4, 4), 2, 2),
    "torch.nn.FractionalMaxPool3d": lambda: F.fractional_max_pool3d(values(1, 2, 4, 4, 4), 2, 2),
    "torch.nn.MaxUnpool1d": lambda: unpool(1),
    "torch.nn.MaxUnpool2d": lambda: unpool(2),
    "torch.nn.MaxUnpool3d": lambda: unpool(3),
    "torch.nn.functional.interpolate": lambda: F.interpolate(values(1, 2, 4, 4), scale_factor=2, mode="bilinear"),
    "torch.nn.functional.grid_sample": lambda: F.grid_sample(
        values(1, 2, 4, 4), torch.zeros(1, 4, 4, 2), align_corners=False
    ),
    "torch.nn.NLLLoss": lambda: F.nll_loss(values(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)),
    "torch.nn.CTCLoss": lambda: F.ctc_loss(
        values(4, 1, 3).log_softmax(2), torch.ones(1, 2, dtype=torch.int64), torch.tensor([4]), torch.tensor([2])
    ),
    "torch.histc": lambda: torch.rand(4).histc(),
    "torch.bincount": lambda: INDEX.bincount(torch.rand(4)),
    "torch.median": lambda: values(4).median(0)[0],
    "torch.kthvalue": lambda: values(4).kthvalue(2)[0],
}
# A sparse product, quantized tensors, and convolutions, for which `train.engine.runtime` sets cuDNN's own switch.
LEFT_OUT = re.compile(r"torch\.(bmm|Tensor\.resize_|nn\.Conv\w*)")


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", CALLS)
def test_an_operator_that_varies_is_recorded(name):
    with Varying() as found:
        result = CALLS[name]()
        if result.requires_grad:
            result.sum().backward()
    assert found.names


def test_every_operator_that_torch_names_is_tried():
    named = re.findall(r"\* :(?:func|class):`([\w.]+)`", torch.use_deterministic_algorithms.__doc__)
    assert len(named) > 30
    assert {name for name in named if not LEFT_OUT.fullmatch(name)} <= CALLS.keys()
