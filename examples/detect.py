"""Train torchvision's RetinaNet on one of our backbones with a few drawn images until it detects every box.

    python examples/detect.py [--backbone NAME] [--steps N] [--images N] [--seed S]

The backbone is any model with feature maps of strides 4 to 32. It is made small here, so that training takes a minute
on a CPU. For real training, omit these settings, load published weights (`catmodel.load_published(backbone, file)`) and
freeze the first stages (`backbone.freeze(1)`).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, box_iou

import catmodel

SIZE = 96  # side of the images, in pixels
SMALL = {  # settings of small models: one block per stage, few channels
    "cat": dict(
        embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), init_std=None, drop_path_rate=0.0, cpsa_drop=0.0
    ),
    "pvt": dict(embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), drop_path_rate=0.0),
    "cot": dict(depths=(1, 1, 1, 1), width=0.25),
}


class Pyramid(nn.Module):
    """A feature pyramid for torchvision: [B, 3, H, W] → {level: map [B, out_channels, H/stride, W/stride]}."""

    def __init__(self, backbone: nn.Module, out_channels: int):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        channels = [backbone.feature_info[i]["num_chs"] for i in backbone.out_indices]
        self.fpn = FeaturePyramidNetwork(channels, out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        return self.fpn({str(level): x_BCHW for level, x_BCHW in enumerate(maps)})


def build(name: str) -> RetinaNet:
    """RetinaNet on the maps of strides 8, 16 and 32; class 0 is torchvision's background, 1 a disk, 2 a square."""
    family = "cot" if "cot" in name else name[:3]
    backbone = catmodel.create_model(name, features_only=True, out_indices=(1, 2, 3), **SMALL[family])
    sides = tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in (16, 32, 64))
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 3)
    # Training takes more steps without norms.
    head = RetinaNetHead(32, num_anchors=9, num_classes=3, norm_layer=partial(nn.GroupNorm, 8))
    pyramid = Pyramid(backbone, 32)
    return RetinaNet(pyramid, num_classes=3, anchor_generator=anchors, head=head, min_size=SIZE, max_size=SIZE)


def draw(count: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Draw images and their boxes (x1, y1, x2, y2) in pixels.

    An image is noise with one to three bright disks and squares, each in another quarter of the image.
    """
    random = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE) + 0.5
    images, targets = [], []
    for _ in range(count):
        image, boxes, labels = torch.rand(3, SIZE, SIZE, generator=random) * 0.3, [], []
        number = int(torch.randint(1, 4, (), generator=random))
        for quarter in torch.randperm(4, generator=random)[:number].tolist():
            radius = 8 + 14 * torch.rand((), generator=random)
            room = SIZE / 2 - 2 * radius
            x, y = (
                radius + room * torch.rand(2, generator=random) + SIZE / 2 * torch.tensor([quarter % 2, quarter // 2])
            )
            label = int(torch.randint(1, 3, (), generator=random))
            dx, dy = (axis - x).abs()[None, :], (axis - y).abs()[:, None]
            inside = (dx**2 + dy**2).sqrt() < radius if label == 1 else torch.maximum(dx, dy) < radius
            image[:, inside] += 0.3 + 0.4 * torch.rand(3, 1, generator=random)
            boxes.append(torch.stack([x - radius, y - radius, x + radius, y + radius]))
            labels.append(label)
        images.append(image)
        targets.append({"boxes": torch.stack(boxes), "labels": torch.tensor(labels)})
    return images, targets


@torch.no_grad()
def evaluate(model: RetinaNet, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[float, int, int]:
    """Evaluate detections with a score above 0.5.

    Returns the mean over true boxes of the largest IoU with a detection of their class, the number of true boxes for
    which it is above 0.5, and the number of detections that have an IoU below 0.5 with every box of their class.
    """
    model.eval()
    best, false = [], 0
    for found, target in zip(model(images), targets, strict=True):
        confident = found["scores"] > 0.5
        iou = box_iou(target["boxes"], found["boxes"][confident])
        iou = iou * (target["labels"][:, None] == found["labels"][confident])
        best += [float(row.max()) if len(row) else 0.0 for row in iou]
        false += sum(float(column.max()) < 0.5 for column in iou.T)
    return sum(best) / len(best), sum(value > 0.5 for value in best), false


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Train torchvision's RetinaNet on one of our backbones until it overfits a few images."
    )
    backbone_help = "e.g. pvt_tiny, cotnet50 (default: %(default)s)"
    parser.add_argument("--backbone", default="cat_tiny", metavar="NAME", help=backbone_help)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    if options.backbone not in catmodel.list_models() or options.backbone == "cat_nano":
        names = ", ".join(name for name in catmodel.list_models() if name != "cat_nano")
        print(f"error: --backbone {options.backbone}: must be one of {names}", file=sys.stderr)
        return 78
    torch.manual_seed(options.seed)
    model = build(options.backbone)
    images, targets = draw(options.images, options.seed)
    boxes = sum(len(target["boxes"]) for target in targets)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"RetinaNet on {options.backbone}: {parameters:,} parameters; {boxes} boxes in {len(images)} images")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=options.steps, pct_start=0.1)
    model.train()
    for step in range(1, options.steps + 1):
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: " + ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))
    mean_iou, found, false = evaluate(model, images, targets)
    print(f"mean IoU {mean_iou:.3f}; {found} of {boxes} boxes found, {false} false detections")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
