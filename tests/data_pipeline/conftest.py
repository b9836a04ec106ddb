from pathlib import Path

import pytest

from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import PER_SHARD, SAMPLES


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """12 shards of 5 images; a shard has slightly more than 10 kB."""
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, [jpeg(number, 40, 36) for number in range(SAMPLES)], per_shard=PER_SHARD)
    return folder
