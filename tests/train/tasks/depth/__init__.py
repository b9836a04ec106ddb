"""A task of the tests: per-pixel regression, with targets of varying size.

It is registered, and nothing else knows of it.
"""

from pydantic import Field

from train.config_sections import TaskConfig


class Settings(TaskConfig):
    absolute: float = Field(0.5, ge=0, description="weight of the absolute error beside the squared one")


def load() -> type:
    from tests.train.tasks.depth.task import Depth

    return Depth
