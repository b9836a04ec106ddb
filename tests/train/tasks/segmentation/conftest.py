"""A drawn dataset of 40 training and 13 validation scenes, and a config that trains a tiny network on it in seconds."""

import sys

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The drawn files: images/<split>/*.jpg, annotations/<split>/*.png, classes.txt."""
    sys.path.insert(0, str(ROOT / "examples"))
    from draw_segments import draw_dataset

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    draw_dataset(folder, train=40, val=13, seed=0)
    return folder


@pytest.fixture(scope="session")
def segments(scenes, tmp_path_factory):
    """`scenes`, prepared."""
    from data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("segments") / "dataset"
    prepare(str(scenes), folder, workers=1, shard_bytes=200_000, val_fraction=0.0, seed=0)
    return folder


@pytest.fixture(scope="session")
def segment_config(segments, tmp_path_factory):
    """20 steps of 4 micro-batches of 2, with every source of randomness."""
    path = tmp_path_factory.mktemp("configs") / "segments.yaml"
    path.write_text(f"""
task:
  {{name: segmentation, crop: [64, 96], scale: [96, 96], scale_range: [0.5, 1.5], neck_channels: 32, head_channels: 16}}
model: {{name: cat_tiny, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], drop_path_rate: 0.2, cpsa_drop: 0.2}}
data: {{path: {segments}, workers: 1, prefetch: 2, interpolation: bilinear}}
train: {{steps: 20, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 1, evaluate_every_steps: 10}}
checkpoint: {{every_steps: 4}}
optimizer: {{lr: 1.0e-4}}  # so low that predictions stay those of a random network: of five classes
schedule: {{kind: poly, warmup_steps: 2, min_lr: 0}}
ema: {{decay: 0.9}}
monitor: {{record_samples: true, images: 4}}
guard: {{agree_every: 0}}
""")
    return path
