"""torchvision's RetinaNet with a ResNet-18 FPN, trained from scratch by its own recipe on a dataset for detection.

The recipe is that of torchvision's references/detection: SGD with momentum 0.9 and weight decay 1e-4, a linear warm-up
over the first epoch, the learning rate divided by 10 after 16/26 and 22/26 of the epochs, and horizontal flips.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from data_pipeline.durable import write_atomically
from data_pipeline.manifest import open_manifest
from data_pipeline.objects import ObjectTable
from data_pipeline.split import Split

STRIDES = (8, 16, 32, 64, 128)  # of the levels
MILESTONES = (16 / 26, 22 / 26)
WARM_UP = 1e-3  # the first step's learning rate / the full one


def build(classes: int, scale: tuple[int, int], anchor_scale: float) -> RetinaNet:
    """The network; its class 0 is the background. scale: (long, short) sides of images, in training and evaluation.

    anchor_scale: as task.anchor_scale; torchvision's own anchors are those of 4. Nothing is frozen, because nothing is
    pretrained: all stages learn, and batch norm has its own statistics.
    """
    levels = dict(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **levels
    )
    sizes = tuple(tuple(anchor_scale * stride * 2 ** (part / 3) for part in range(3)) for stride in STRIDES)
    anchors = AnchorGenerator(sizes, aspect_ratios=((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(backbone, classes + 1, min_size=scale[1], max_size=scale[0], anchor_generator=anchors)


class Images:
    """A split's images and objects, from its shards."""

    def __init__(self, split: Split):
        self._split, self.table = split, ObjectTable(split)

    def __len__(self) -> int:
        return self._split.samples

    def image(self, number: int) -> Tensor:
        """RGB, float [3, height, width] in 0..1."""
        record = self._split.records[number]
        with open(self._split.folder / self._split.shards[record["shard"]].file, "rb") as file:
            file.seek(int(record["offset"]))
            data = np.frombuffer(file.read(int(record["size"])), np.uint8).copy()
        return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB) / 255

    def target(self, number: int) -> dict[str, Tensor]:
        """Boxes (left, top, right, bottom), without crowds, and their labels, counted from 1."""
        objects = self.table.of(number)
        objects = objects[objects["crowd"] == 0]
        left, top = objects["x"], objects["y"]
        boxes = np.stack([left, top, left + objects["width"], top + objects["height"]], axis=1)
        labels = torch.from_numpy(objects["label"].astype(np.int64) + 1)
        return {"boxes": torch.from_numpy(boxes.astype(np.float32)), "labels": labels}


def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[2]
    return image.flip(2), target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}


def rate_at(step: int, steps_per_epoch: int, epochs: int, rate: float) -> float:
    if step < min(1000, steps_per_epoch):
        return rate * (WARM_UP + (1 - WARM_UP) * step / min(1000, steps_per_epoch))
    return rate * 0.1 ** sum(step >= round(share * epochs) * steps_per_epoch for share in MILESTONES)


def batches(images: Images, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Shuffled batches of an epoch; the images that do not fill one are left out, as in our trainer."""
    order = torch.randperm(len(images), generator=generator).tolist()
    return (order[at : at + size] for at in range(0, len(order) - size + 1, size))


@torch.no_grad()
def evaluate(model: RetinaNet, images: Images, classes: tuple[str, ...]) -> dict[str, float | None]:
    """COCO's scores in percent, one image at a time; None without an object to find."""
    from train.tasks.detection.coco import FOUND, coco_scores, truth_of
    from train.telemetry.monitor import finite

    model.eval()
    rows = []
    for number in range(len(images)):
        [found] = model([images.image(number)])
        boxes = found["boxes"].double().numpy()
        row = np.zeros(len(boxes), FOUND)
        row["image"], row["label"], row["score"] = number, found["labels"].numpy() - 1, found["scores"].numpy()
        row["x"], row["y"], row["width"], row["height"] = *boxes[:, :2].T, *(boxes[:, 2:] - boxes[:, :2]).T
        rows.append(row)
    truth = truth_of(images.table, np.arange(len(images)))
    scores = coco_scores(truth, np.concatenate(rows), classes).values
    return finite({name: 100 * value for name, value in scores.items()})


def as_bytes(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def train(
    dataset: Path,
    output: Path,
    rate: float,
    epochs: int,
    batch: int,
    scale: tuple[int, int],
    anchor_scale: float,
    every: int,
) -> None:
    """Train, and evaluate after every `every` epochs; writes `output` (JSON) at the end.

    After every epoch the state is stored beside `output`; an interrupted training goes on from there. scale,
    anchor_scale: see `build`.
    """
    manifest = open_manifest(dataset)
    images, held_out = (Images(manifest.split(name)) for name in ("train", "val"))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build(len(manifest.classes), scale, anchor_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    steps_per_epoch, step, evaluations, first, stored = len(images) // batch, 0, [], 1, output.with_suffix(".pt")
    if stored.exists():
        state = torch.load(stored)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, evaluations, first = state["step"], state["evaluations"], state["step"] // steps_per_epoch + 1
    for epoch in range(first, epochs + 1):
        model.train()
        for numbers in batches(images, batch, generator):
            optimizer.param_groups[0]["lr"] = rate_at(step, steps_per_epoch, epochs, rate)
            pairs = [(images.image(number), images.target(number)) for number in numbers]
            coins = torch.rand(batch, generator=generator).tolist()
            pairs = [flipped(*pair) if coin < 0.5 else pair for pair, coin in zip(pairs, coins, strict=True)]
            losses = model(*map(list, zip(*pairs, strict=True)))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            step += 1
        if epoch % every == 0 or epoch == epochs:
            evaluations.append({"step": step, **evaluate(model, held_out, manifest.classes)})
            print(f"epoch {epoch}: AP {evaluations[-1]['ap']:.1f}, AP50 {evaluations[-1]['ap50']:.1f}", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        write_atomically(stored, as_bytes({**state, "step": step, "evaluations": evaluations}))
    output.write_text(json.dumps(evaluations) + "\n")
