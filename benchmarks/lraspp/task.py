"""The task `segmentation` with torchvision's network."""

from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from train.tasks.segmentation.task import Segmentation


class LRASPP(nn.Module):
    """torchvision's network without its last step, the enlargement of the logits, which the task does."""

    stride = 8

    def __init__(self, num_classes: int):
        super().__init__()
        whole = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone, self.classifier = whole.backbone, whole.classifier

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, num_classes, H / 8, W / 8]."""
        return self.classifier(self.backbone(images))

    def no_weight_decay(self) -> set[str]:
        return set()


class LRASPPSegmentation(Segmentation):
    def build_model(self) -> nn.Module:
        return LRASPP(len(self.classes))
