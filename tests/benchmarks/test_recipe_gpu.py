import pytest
import torch

import tests.data_pipeline.recipe.interpreter  # noqa: F401  before anything uses the kernels
from benchmarks import recipe_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        recipe_gpu.main([])
    assert "there is no GPU" in capsys.readouterr().err


def test_both_ways_compute_the_same(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(recipe_gpu, "ROUNDS", 1)
    device = tests.data_pipeline.recipe.interpreter.DEVICE
    images, labels = recipe_gpu.batch_of(4, 16, 10, device)
    ways = (way(images, labels, 10, recipe_gpu.RECIPE) for way in (recipe_gpu.plain, recipe_gpu.kernels))
    found = recipe_gpu.largest_difference(*ways)
    assert 0 < found["largest"] < 1e-5 and found["targets"] < 1e-6
