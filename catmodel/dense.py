"""What networks for dense tasks share: they are built on a backbone of catmodel."""

from torch import Tensor, nn

from catmodel.pretrained import load_published


class Dense(nn.Module):
    """A backbone, a neck and a head.

    backbone: a network of catmodel with features_only.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions without weight decay: the backbone's."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for layer-wise learning rates: the backbone's; a classifier's head for the rest."""
        part, _, rest = name.partition(".")
        return self.backbone.layer_of(rest if part == "backbone" else "fc.weight")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def set_kernels(self, enable: bool = True) -> None:
        """Use the backbone's Triton kernels if device, dtype and shapes allow it, or PyTorch's operators only."""
        self.backbone.set_kernels(enable)

    def freeze(self, stages: int) -> None:
        """Freeze the backbone's stem and its first `stages` stages; see `variants.Staged.freeze`."""
        self.backbone.freeze(stages)

    def load_classifier(self, weights: dict[str, Tensor]) -> list[str]:
        """Fill the backbone with a classifier's weights: a released file's or a run's state dict. Returns sentences for
        the log.

        Position tables are interpolated to the backbone's img_size. The classifier's head is left out; neck, head and
        the norms of CAT's maps keep their initial weights. Raises pretrained.DoesNotFit.
        """
        report = load_published(self.backbone, weights, resize_positions=True)
        sentences = [f"position tables interpolated: {', '.join(report.resized)}"] if report.resized else []
        norms = sorted({key.partition(".")[0] for key in report.fresh})
        return [*sentences, f"fresh: {', '.join([*norms, 'neck', 'head'])}"]
