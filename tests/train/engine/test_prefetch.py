import itertools

import pytest
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import MicroBatch, build_loader
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.views import Crops
from train.engine.prefetch import Prefetcher

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def loader(dataset):
    split = open_manifest(dataset).split("train")
    data = DataConfig(path=str(dataset), image_size=64, workers=2, prefetch=3)
    return build_loader(data, Crops(data, AugmentConfig()), split, Order(0, split.samples, 64, 16))


@pytest.mark.parametrize("device", DEVICES)
def test_every_micro_batch_comes_once_in_order_and_whole(tiny_dataset, device):
    """On a GPU while the model's stream is busy and memory is used again at once: what a missing wait would spoil."""
    device = torch.device(device)

    made = []

    def inputs(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        made.append((batch.step, batch.index))
        images = batch.images.to(device, non_blocking=True).float()
        return (images * 2 + 1).contiguous(), batch.targets.to(device, non_blocking=True) + 1

    waits, busy = [], torch.ones(1024, 1024, device=device)
    with loader(tiny_dataset) as plain:
        expected = list(itertools.islice(plain, 24))
    found = []
    with Prefetcher(loader(tiny_dataset), inputs, device, waits.append) as feed:
        for number in range(1, 25):
            batch, (images, targets) = next(feed)
            assert len(made) == number and made[-1] == (batch.step, batch.index)
            for _ in range(20 if device.type == "cuda" else 1):
                busy = (busy @ busy).clamp(max=1)
            copied = images.clone(), targets.clone()  # by the model's stream, after all of that
            del images, targets
            feed.prepare()
            assert len(made) == number + (device.type == "cuda")  # on a GPU one micro-batch ahead, on a CPU none
            found.append((batch, *copied))
    assert len(waits) == 24 + (device.type == "cuda")
    for batch, (other, images, targets) in zip(expected, found, strict=True):
        assert (batch.step, batch.index) == (other.step, other.index)
        assert torch.equal(images.cpu(), batch.images.float() * 2 + 1)
        assert torch.equal(targets.cpu(), batch.targets + 1)


def test_leaving_it_closes_the_loader(tiny_dataset):
    batches = loader(tiny_dataset)
    with Prefetcher(
        batches, lambda batch: (batch.images, batch.targets), torch.device("cpu"), lambda seconds: None
    ) as feed:
        next(feed)
    assert not any(thread.is_alive() for thread in batches._threads)
