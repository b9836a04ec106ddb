"""What the named variants of all families share."""

import difflib
import inspect
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
