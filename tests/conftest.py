"""Fixtures shared by the folders: a tiny prepared dataset and a config that trains on it in seconds."""

import json
import os
import signal
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tests.catmodel.kernels.interpreter  # noqa: F401, I001  before anything imports Triton
from tests import skips
from train.engine.processor import processor_name

# A shell that runs the tests in the background ignores SIGINT, and all processes that they start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.pluginmanager.register(skips)


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write the tests' measurements (record_property) as JSON")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--results")
    if not path:
        return
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [report for report in reports if getattr(report, "when", None) == "call"]
    results = {
        "command": " ".join(["pytest", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, shared",
        "tests": {
            report.nodeid: {
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                **dict(report.user_properties),
            }
            for report in sorted(reports, key=lambda report: report.nodeid)
        },
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of 260 training and 101 validation JPEGs, 16 to 32 pixels wide, of 10 classes that differ in colour."""
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
    from data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(str(tiny_images), folder, workers=1, shard_bytes=100_000, val_fraction=0.0, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_dataset, tmp_path_factory):
    """A config of 2 epochs of 8 steps with 4 micro-batches of 8, and with every source of randomness."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(f"""
model: {{name: cat_nano, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], drop_path_rate: 0.2, cpsa_drop: 0.2}}
data: {{path: {tiny_dataset}, image_size: 16, workers: 1, prefetch: 2}}
augment: {{crop: resized, erasing: 0.25, mixup: 0.8, cutmix: 1.0, label_smoothing: 0.1}}
train: {{epochs: 2, global_batch: 32, micro_batch: 8, precision: fp32, log_every: 1}}
schedule: {{warmup_epochs: 0.5}}
ema: {{decay: 0.9}}
monitor: {{record_samples: true, images: 0}}
guard: {{agree_every: 0}}
""")
    return path
