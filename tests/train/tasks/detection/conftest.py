"""A drawn dataset of 40 training and 101 validation scenes, and a config that trains a tiny detector in seconds."""

import sys

import pytest

from tests.runs import ROOT, run


@pytest.fixture(scope="session")
def box_scenes(tmp_path_factory):
    """The drawn files: <split>/*.jpg, annotations/instances_<split>.json."""
    sys.path.insert(0, str(ROOT / "examples"))
    from draw_boxes import draw_dataset

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    draw_dataset(folder, train=40, val=101, seed=0)
    return folder


@pytest.fixture(scope="session")
def boxes(box_scenes, tmp_path_factory):
    """`box_scenes`, prepared."""
    from data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("boxes") / "dataset"
    prepare(str(box_scenes), folder, workers=1, shard_bytes=200_000, val_fraction=0.0, seed=0)
    return folder


@pytest.fixture(scope="session")
def box_config(boxes, tmp_path_factory):
    """20 steps of 4 micro-batches of 2, with every source of randomness: scales, crops, flips, aspect groups.

    A random network's scores, about 0.01, are above the threshold: an evaluation has many detections to order.
    """
    path = tmp_path_factory.mktemp("configs") / "boxes.yaml"
    path.write_text(f"""
task:
  {{name: detection, scales: [[96, 48], [96, 64], [128, 80]], crop_scales: [[200, 80], [200, 96]], crop_range: [40, 72],
    test_scale: [64, 64], neck_channels: 16, head_channels: 64, head_convs: 1, score_threshold: 0.005}}
model: {{name: cat_tiny, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], drop_path_rate: 0.2, cpsa_drop: 0.2}}
data: {{path: {boxes}, workers: 1, prefetch: 2, interpolation: bilinear}}
train: {{steps: 20, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 1, evaluate_every_steps: 20}}
checkpoint: {{every_steps: 4}}
optimizer: {{lr: 1.0e-4}}
schedule: {{kind: multistep, decay_steps: [15], warmup_steps: 2}}
ema: {{decay: 0.9}}
monitor: {{record_samples: true, images: 4}}
guard: {{agree_every: 0}}
""")
    return path


@pytest.fixture(scope="session")
def whole(box_config, tmp_path_factory):
    """A finished run of `box_config`, on two ranks."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(box_config, output, "checkpoint.keep=9", world=2)
    return output
