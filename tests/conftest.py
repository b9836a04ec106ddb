"""Fixtures shared by the folders: a tiny prepared dataset and a config that trains on it in seconds."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """An image folder of 260 training and 101 validation JPEGs of 10 classes that colour tells apart, 16 to 32 pixels wide."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for split, count in (("train", 260), ("val", 101)):
        for index in range(count):
            label = index % 10
            pixels = random.randint(0, 128, (random.randint(16, 33), random.randint(16, 33), 3)).astype(np.uint8)
            pixels[:, :, label % 3] += np.uint8(12 * label)
            path = folder / split / f"class_{label}" / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tiny_images, tmp_path_factory):
    """`tiny_images`, prepared."""
    from data_pipeline.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(str(tiny_images), folder, workers=1, shard_bytes=100_000, val_fraction=0.0, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_dataset, tmp_path_factory):
    """A config of 2 epochs of 8 steps, 4 micro-batches of 8 each, with every source of randomness on."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(f"""
model: {{name: cat_nano, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], drop_path_rate: 0.2, cpsa_drop: 0.2}}
data: {{path: {tiny_dataset}, image_size: 16, workers: 1, prefetch: 2}}
augment: {{crop: resized, erasing: 0.25, mixup: 0.8, cutmix: 1.0, label_smoothing: 0.1}}
train: {{epochs: 2, global_batch: 32, micro_batch: 8, precision: fp32, log_every: 1}}
schedule: {{warmup_epochs: 0.5}}
ema: {{decay: 0.9}}
monitor: {{record_samples: true, images: 0}}
""")
    return path
