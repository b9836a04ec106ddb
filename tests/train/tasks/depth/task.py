"""For each image a map: a ramp of the height and width that annotation `size` gives, times its annotation `level`."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from data_pipeline.annotations import Cut
from data_pipeline.augment import augment, normalise, sample_keys
from data_pipeline.loader import MicroBatch
from data_pipeline.split import Split
from train.tasks.base import Model, Task, on_device
from train.telemetry.metrics import Metric, Scores


class Maps:
    """Targets float [h, w] of a different size for each sample; mirrored with their image."""

    stored = None

    def __init__(self, split: Split):
        self._sizes, self._levels = split.annotation("size"), split.annotation("level")

    def read(self, ids: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> Cut:
        found, windows = [], candidates[:, 0]
        for (height, width), level, window in zip(self._sizes[ids], self._levels[ids], windows, strict=True):
            ramp = torch.linspace(0, float(level), int(width)).expand(int(height), int(width))
            found.append((ramp.flip(1) if window[4] else ramp).contiguous())
        return Cut(windows, found)

    def collate(self, targets: list[Tensor]) -> list[Tensor]:
        return targets


class DepthNet(nn.Module):
    def __init__(self, backbone: nn.Module, channels: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


class Depth(Task):
    metrics = (Metric("rmse", "RMSE", "", "lower"), Metric("mae", "MAE", "", "lower"))
    losses = ("squared", "absolute")
    samples = "maps"

    def build_model(self) -> nn.Module:
        config = self.config
        backbone = catmodel.create_model(config.model.name, features_only=True, **config.model.overrides())
        return DepthNet(backbone, config.model.embed_dim * 2 ** (len(config.model.depths) - 1))

    def example(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(
            count, 3, self.config.data.image_size, self.config.data.image_size, device=device, dtype=dtype
        )

    def example_loss(self, output: Tensor) -> Tensor:
        return output.float().square().mean()

    def targets(self, split: Split, training: bool) -> Maps:
        return Maps(split)

    def inputs(self, batch: MicroBatch, epoch: int, device: torch.device) -> dict:
        keys = sample_keys(self.config.train.seed, epoch, batch.draws)
        images = augment(on_device(batch, device), keys, self.config.augment)
        return {"images": images, "maps": [target.to(device) for target in batch.targets]}

    def loss(self, model: Model, inputs: dict) -> dict[str, Tensor]:
        errors = self._errors(model(inputs["images"]), inputs["maps"])
        squared = torch.stack([error.square().mean() for error in errors]).mean()
        absolute = torch.stack([error.abs().mean() for error in errors]).mean()
        return {"squared": squared, "absolute": self.config.task.absolute * absolute}

    @staticmethod
    def _errors(output: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """The differences of each map, [h, w]."""
        pairs = zip(output.float(), targets, strict=True)
        return [F.interpolate(one[None], target.shape, mode="bilinear")[0, 0] - target for one, target in pairs]

    def preview(self, inputs: dict, count: int) -> Tensor:
        return inputs["images"][:count].float().cpu().clamp(0, 1)

    def tally(self, device: torch.device, split: Split) -> "DepthTally":
        return DepthTally(self, device)


class DepthTally:
    width = 4

    def __init__(self, task: Depth, device: torch.device):
        self._task, self._device = task, device

    def add(self, model: Model, batch: MicroBatch) -> Tensor:
        output = model(normalise(on_device(batch, self._device), self._task.config.augment))
        sums = torch.zeros(self.width, dtype=torch.float64, device=self._device)
        for error, counted in zip(self._task._errors(output, batch.targets), batch.counted.tolist(), strict=True):
            if counted:
                error = error.double()
                sums += torch.stack(
                    [error.square().sum(), error.abs().sum(), torch.tensor(float(error.numel())), torch.tensor(1.0)]
                )
        return sums

    def finish(self, sums: Sequence[float]) -> tuple[Scores, dict]:
        squared, absolute, pixels, count = sums
        return Scores({"rmse": (squared / pixels) ** 0.5, "mae": absolute / pixels}, int(count)), {
            "pixels": int(pixels)
        }
