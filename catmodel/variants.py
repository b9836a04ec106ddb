"""What the named variants of all families share."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

Model = TypeVar("Model")


def build(model_class: type[Model], overrides: dict[str, Any], **defaults: Any) -> Model:
    """model_class(**defaults) with `overrides` in place of defaults. Raises ValueError for an override that it does not know."""
    known = inspect.signature(model_class).parameters
    unknown = [name for name in overrides if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{model_class.__name__} takes {', '.join(known)}"
        raise ValueError(f"unknown model setting {unknown[0]!r}: {hint}")
    return model_class(**{**defaults, **overrides})


def stages_asked_for(out_indices: Sequence[int] | None, stages: int, features_only: bool) -> tuple[int, ...]:
    """The stages whose maps a backbone returns, ascending (none for a classifier). Negative indices count from the last stage."""
    if not features_only:
        if out_indices is not None:
            raise ValueError("out_indices needs features_only=True")
        return ()
    indices = range(stages) if out_indices is None else sorted({i + stages if i < 0 else i for i in out_indices})
    if not indices or indices[0] < 0 or indices[-1] >= stages:
        raise ValueError(f"out_indices {out_indices}: must name stages of 0 to {stages - 1}")
    return tuple(indices)
