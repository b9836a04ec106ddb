import pytest

from tests.data_pipeline.recipe.interpreter import DEVICE


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Without a GPU: Triton's interpreter, and larger blocks, because it runs programs one after another."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("data_pipeline.recipe.launch.BLOCK", 1024)
