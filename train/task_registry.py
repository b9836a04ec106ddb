"""Which tasks there are, by name. Light: the modules it returns import neither torch nor each other."""

import difflib
import importlib
import re
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parent / "tasks"
_registered: dict[str, str] = {}


class UnknownTask(ValueError):
    """There is no task of this name."""


def register(name: str, module: str) -> None:
    """Make the importable package `module` known as task `name`, in this process: for tasks outside of train/tasks/."""
    _registered[name] = module


def names() -> list[str]:
    """The tasks of train/tasks/, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/__init__.py"))


def find(name: str) -> ModuleType:
    """The package of a task (see train/tasks/__init__.py). Raises UnknownTask."""
    if name in _registered:
        return importlib.import_module(_registered[name])
    known = names()
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"tasks: {', '.join([*known, *_registered])}"
        raise UnknownTask(f"there is no task {name!r}; {hint}")
    return importlib.import_module(f"train.tasks.{name}")
