"""The detection example: torchvision's RetinaNet on our backbones detects the boxes that it was trained on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import detect

    return detect


@pytest.mark.slow
def test_cat_detects_all_boxes():
    command = [sys.executable, str(ROOT / "examples/detect.py"), "--steps", "80", "--images", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    boxes = int(re.search(r"(\d+) boxes in 2 images", result.stdout)[1])
    iou, found = re.search(r"mean IoU ([\d.]+); (\d+) of", result.stdout).groups()
    assert float(iou) > 0.7 and int(found) == boxes >= 2, result.stdout


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["pvt_tiny", "se_cotnetd152"])
def test_other_backbones_can_be_chosen_by_name(example, backbone: str):
    import torch

    torch.manual_seed(0)
    model, (images, targets) = example.build(backbone).train(), example.draw(2, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        losses.append(sum(model(images, targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.backbone.backbone.parameters())


@pytest.mark.slow
def test_an_unknown_backbone_is_named(example, capsys):
    assert example.main(["--backbone", "resnet50"]) == 78
    assert "--backbone resnet50: must be one of cat_base" in capsys.readouterr().err
