"""The reference of all config keys, made from the config's classes; launch/docs.py writes it into docs/config.md."""

import inspect
import types
import typing
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_pipeline.config import Section
from train import task_registry
from train.config import Config, is_free
from train.config_sections import TaskConfig

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def reference() -> str:
    """A heading, a table of keys and the rules of each section."""
    parts = [part for name, field in Config.model_fields.items() for part in section(name, field.annotation)]
    for name in task_registry.names():
        settings = task_registry.find(name).Settings
        if settings is not TaskConfig:
            parts += section("task", settings, f"task: settings of {name}", known=TaskConfig.model_fields)
    return "\n\n".join([*parts, "## Across sections", rules(Config)])


def section(name: str, kind: type[Section], title: str = "", known: Collection[str] = ()) -> Iterator[str]:
    """The Markdown parts of a section, without the keys that are `known`, and of the sections inside it."""
    yield f"## {title or name}"
    if kind.__doc__:
        yield inspect.cleandoc(kind.__doc__)
    rows, inner = [], []
    task = kind if issubclass(kind, TaskConfig) else TaskConfig
    for key, field in kind.model_fields.items():
        path = f"{name}.{key}"
        if key in known:
            continue
        if is_section(field.annotation):
            inner += section(path, field.annotation)
        else:
            cells = [f"`{path}`", type_of(field), default(field), "free" if is_free(path, task) else "fixed"]
            rows.append([*cells, (field.description or "").replace("|", "\\|")])
    lines = [["key", "type", "default", "at a resume", "what it does"], ["---"] * 5, *rows]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if rules(kind):
        yield rules(kind)
    yield from inner


def rules(kind: type[Section]) -> str:
    """The rules of a section as a list: the docstrings of its validators."""
    decorators = kind.__pydantic_decorators__
    found = [*decorators.field_validators.values(), *decorators.model_validators.values()]
    return "\n".join(f"- {inspect.getdoc(decorator.func)}" for decorator in found)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def type_of(field: FieldInfo) -> str:
    """The type of a key as text, such as "int ≥ 1, or null"."""
    return with_bounds(describe(field.annotation), field.metadata)


def describe(annotation: Any) -> str:
    """A type annotation as text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, *metadata = arguments
        return with_bounds(describe(kind), [bound for item in metadata for bound in getattr(item, "metadata", [item])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        item = describe(arguments[0])
        return f"list of {item}" if arguments[-1] is Ellipsis else f"{len(arguments)} × {item}"
    return "null" if annotation is type(None) else annotation.__name__


def with_bounds(text: str, metadata: list) -> str:
    """`text` with the bounds after the first of several types, because null has none."""
    bounds = [
        f"{sign} {getattr(item, name):g}" for item in metadata for name, sign in SIGNS.items() if hasattr(item, name)
    ]
    first, *rest = text.split(", or ")
    return ", or ".join([" ".join([first, " and ".join(bounds)]) if bounds else first, *rest])


def default(field: FieldInfo) -> str:
    """The default value as YAML."""
    if field.default is PydanticUndefined:
        return "none: must be given"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"
