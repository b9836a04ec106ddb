"""Estimated bytes of memory, against counts by hand. The doctor's tests compare them with a real step."""

import torch
from torch import nn

from train.config import load_config
from train.engine.estimate import activation_bytes, checkpoint_bytes, resident_bytes
from train.engine.runtime import Runtime


def layers() -> nn.Module:
    """212 weights."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")


def test_activations_are_counted_once_and_weights_are_not():
    """The input of the first layer, and the output of the ReLU, which is also the second layer's input."""
    assert activation_bytes(layers(), torch.empty(3, 8, device="meta")) == 4 * 3 * (8 + 16)


def test_resident_bytes_of_a_gpu(tiny_config):
    """Two moments, an EMA divided over the ranks, and the gradients' sum; in half precision fp32 masters, too."""
    gpu = Runtime(0, 4, 0, torch.device("cuda"))
    config = load_config(tiny_config, ["zero.stage=0", "ema.decay=0.99", "train.precision=fp32"])
    assert resident_bytes(layers(), config, gpu) == {"weights": 848, "gradients": 848, "optimizer": 212 * (8 + 4 + 1)}
    config = load_config(tiny_config, ["zero.stage=0", "ema.decay=0.99", "train.precision=bf16"])
    found = resident_bytes(layers().bfloat16(), config, gpu)
    assert found == {"weights": 424, "gradients": 2 * 424, "optimizer": 212 * (4 + 8 + 4 + 1)}


def test_graphs_keep_another_copy_of_the_gradients(tiny_config):
    gpu = Runtime(0, 1, 0, torch.device("cuda"))
    for settings, copies in ((["train.compile=true"], 3), (["train.compile=true", "train.cuda_graphs=false"], 2)):
        config = load_config(tiny_config, ["train.precision=bf16", *settings])
        assert resident_bytes(layers().bfloat16(), config, gpu)["gradients"] == copies * 424
    config = load_config(tiny_config, ["train.precision=bf16", "train.compile=true", "train.cuda_graphs=true"])
    assert resident_bytes(layers().bfloat16(), config, gpu, shapes=3)["gradients"] == 5 * 424  # a graph for each shape


def test_bytes_of_a_checkpoint(tiny_config):
    assert checkpoint_bytes(layers(), load_config(tiny_config, ["ema.decay=0.99"])) == 212 * (4 + 8 + 4)
    assert checkpoint_bytes(layers(), load_config(tiny_config, ["ema.decay=0"])) == 212 * (4 + 8)
