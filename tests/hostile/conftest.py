"""A small prepared dataset."""

from pathlib import Path

import pytest

from tests.data_pipeline.shards import jpeg, write_split
from tests.hostile.datasets import SAMPLES


@pytest.fixture
def dataset(tmp_path) -> Path:
    """3 shards of 4 images."""
    write_split(tmp_path / "dataset", [jpeg(number, 40, 36) for number in range(SAMPLES)], per_shard=4)
    return tmp_path / "dataset"
