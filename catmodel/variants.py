"""Shared by all model families: construction of variants, selection of a backbone's stages, and freezing of stages."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model")


def build(model_class: type[Model], overrides: dict[str, Any], **defaults: Any) -> Model:
    """model_class(**defaults), with `overrides` replacing defaults. Raises ValueError for an unknown override."""
    known = inspect.signature(model_class).parameters
    unknown = [name for name in overrides if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{model_class.__name__} takes {', '.join(known)}"
        raise ValueError(f"unknown model setting {unknown[0]!r}: {hint}")
    return model_class(**{**defaults, **overrides})


def select_stages(out_indices: Sequence[int] | None, stages: int, features_only: bool) -> tuple[int, ...]:
    """The stages whose maps a backbone returns, ascending; none for a classifier. Negative indices count back."""
    if not features_only:
        if out_indices is not None:
            raise ValueError("out_indices needs features_only=True")
        return ()
    indices = range(stages) if out_indices is None else sorted({i + stages if i < 0 else i for i in out_indices})
    if not indices or indices[0] < 0 or indices[-1] >= stages:
        raise ValueError(f"out_indices {out_indices}: must name stages of 0 to {stages - 1}")
    return tuple(indices)


class Staged(nn.Module):
    """A network with a stem and stages, of which the first ones can be frozen."""

    frozen = 0  # number of frozen entries of `stem_and_stages`
    features_only: bool
    img_size: tuple[int, int]

    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(_name_image_size)

    def check_images(self, image: Tensor) -> None:
        """Check images [B, in_chans, H, W] for a classifier of a fixed image size.

        Raises RuntimeError if the model is a backbone, ValueError if the images have another size.
        """
        if self.features_only:
            raise RuntimeError("forward_features is for classifiers: call the features_only model itself")
        found = tuple(image.shape[2:])
        if found != self.img_size:
            raise ValueError(
                f"images are {found}, the model was built for {self.img_size}: "
                f"resize them, or create it with img_size={found}"
            )

    def stem_and_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """The modules and parameters of the stem, then those of each stage."""
        raise NotImplementedError

    def freeze(self, stages: int) -> None:
        """Freeze the stem and the first `stages` stages (0: the stem only), and unfreeze the stages after them.

        Frozen parameters require no gradient. Frozen parts stay in evaluation mode even if `train()` is called later:
        batch norms keep and use their running statistics, and no drop-path or dropout is drawn. CAT's patch projection
        belongs to the stage before it, as in the state dict; PVT's stem is the patch embedding and position table of
        its first stage.

        Raises ValueError if the model has fewer stages.
        """
        parts = self.stem_and_stages()
        if not 0 <= stages < len(parts):
            raise ValueError(
                f"freeze({stages}): must be between 0 (the stem only) and {len(parts) - 1} (the stem and all stages)"
            )
        self.frozen = stages + 1
        for number, part in enumerate(parts):
            for piece in part:
                piece.requires_grad_(number >= self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Staged":
        """Set the training mode, as for any module, except that frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.stem_and_stages()[: self.frozen]:
            for piece in part:
                if isinstance(piece, nn.Module):
                    piece.eval()
        return self


def _name_image_size(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Add the image size to a state dict's metadata, which torch.save keeps.

    The shape [1, L, C] of a position table does not determine its rows and columns.
    """
    if hasattr(model, "img_size"):
        metadata["img_size"] = model.img_size
