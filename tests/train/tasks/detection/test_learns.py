"""Detectors learn: each finds the objects of eight drawn images again that it was trained on."""

import shutil
import sys

import pytest

from tests.runs import ROOT, metrics, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight scenes, which are both train and val."""
    sys.path.insert(0, str(ROOT / "examples"))
    from draw_boxes import draw_dataset

    from data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("eight")
    scenes, annotations = folder / "scenes", folder / "scenes/annotations"
    draw_dataset(scenes, train=8, val=1, seed=0)
    shutil.copytree(scenes / "train", scenes / "val", dirs_exist_ok=True)
    shutil.copy(annotations / "instances_train.json", annotations / "instances_val.json")
    prepare(str(scenes), folder / "data", workers=1, shard_bytes=10**8, val_fraction=0.0, seed=0)
    return folder / "data"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("detector", "anchor_scale", "steps"),
    [
        ("atss", "null", 80),
        pytest.param("retinanet", 2, 300, marks=pytest.mark.long),
        pytest.param("fcos", "null", 300, marks=pytest.mark.long),
    ],
)
def test_eight_images_are_learned_by_heart(eight, tmp_path, detector, anchor_scale, steps):
    """What is evaluated are the inputs that were trained on, padding included: task.divisor pads all to 160 x 160.

    Three of the images are 120 pixels wide. Without the divisor each trains beside a wider image, padded to 160 x 160,
    but is evaluated at 128 x 160. The group norms of FCOS's and ATSS's heads and CAT's attention see the whole map, so
    other padding gives other outputs: FCOS then finds every box of these three too large and loses the smallest one.
    """
    (tmp_path / "config.yaml").write_text(f"""
task: {{name: detection, detector: {detector}, anchor_scale: {anchor_scale}, scales: [[160, 160]], divisor: 160,
  neck_channels: 64, head_channels: 64, head_convs: 2, aspect_groups: false}}
model: {{name: cat_nano, embed_patch_size: 4}}
data: {{path: {eight}, workers: 1, prefetch: 2, interpolation: bilinear}}
augment: {{flip: 0}}
train: {{steps: {steps}, global_batch: 8, micro_batch: 4, precision: fp32, evaluate_every_steps: {steps}}}
optimizer: {{name: muon, lr: 4.0e-3, momentum: 0.95, betas: [0.9, 0.98], weight_decay: 0.0, clip_grad: null}}
schedule: {{warmup_steps: 20, min_lr: 1.0e-5}}
checkpoint: {{every_steps: {steps}}}
ema: {{decay: 0}}
monitor: {{images: 0}}
zero: {{stage: 0}}
""")
    run(tmp_path / "config.yaml", tmp_path / "run", world=2, timeout=1100)
    (line,) = metrics(tmp_path / "run", "eval")
    assert line["ap50"] >= 95 and line["count"] == 8
