import pytest
import torch

import tests.data_pipeline.recipe.interpreter  # noqa: F401  before anything uses the kernels
from benchmarks.gpu import recipe


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        recipe.main([])
    assert "there is no GPU" in capsys.readouterr().err


def test_both_ways_compute_the_same(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(recipe, "ROUNDS", 1)
    device = tests.data_pipeline.recipe.interpreter.DEVICE
    images, labels = recipe.batch_of(4, 16, 10, device)
    ways = (way(images, labels, 10, recipe.RECIPE) for way in (recipe.plain, recipe.kernels))
    found = recipe.largest_difference(*ways)
    assert 0 < found["largest"] < 1e-5 and found["targets"] < 1e-6
