"""`import catmodel` imports no large library, and timm builds our models after `catmodel.register_timm()`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE = """
import torch
assert "cat_tiny" in timm.list_models("cat_*")
model = timm.create_model("cat_nano", num_classes=7, drop_path_rate=0.2)
assert type(model).__module__ == "catmodel.cat" and model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
assert model.layers[-1].cpsa_blocks[-1].add.rate > 0.19
dense = timm.create_model("cat_tiny", features_only=True, out_indices=(1, 2))
assert dense.feature_info.channels() == [128, 256] and dense.feature_info.reduction() == [8, 16]
for name, channels in (("cat_tiny", [128, 256, 512]), ("pvt_tiny", [128, 320, 512]), ("cotnet50", [512, 1024, 2048])):
    with torch.device("meta"):
        dense = timm.create_model(name, features_only=True, out_indices=(1, 2, 3)).eval()
        found = [out.shape[1] for out in dense(torch.empty(1, 3, 65, 97))]
        assert found == dense.feature_info.channels() == channels, name
    assert dense.feature_info.reduction() == [8, 16, 32], name
try:
    timm.create_model("cat_nano", pretrained=True)
except ValueError as error:
    assert "load_published" in str(error)
else:
    raise AssertionError("pretrained=True must not give untrained weights")
assert timm.create_model("resnet18", num_classes=3).num_classes == 3
"""


def run(code: str) -> None:
    """Run the code in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Overwriting" not in result.stderr


def test_importing_catmodel_imports_neither_torch_nor_timm():
    run(
        "import sys, catmodel\n"
        "catmodel.list_models()\n"
        "assert not {'torch', 'timm', 'torchvision', 'einops'} & set(sys.modules)"
    )


def test_models_are_built_without_timm_and_torchvision():
    run(
        "import sys, catmodel\n"
        "sys.modules['timm'] = None  # as if it were not installed\n"
        "catmodel.create_model('cat_nano')\n"
        "assert 'torchvision' not in sys.modules\n"
        "try: catmodel.register_timm()\n"
        "except ModuleNotFoundError: pass\n"
        "else: raise AssertionError"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import catmodel, timm\ncatmodel.register_timm()",
        "import timm, catmodel\ncatmodel.register_timm()",
        "import catmodel\ncatmodel.register_timm()\ncatmodel.register_timm()\nimport timm",
    ],
)
def test_timm_creates_our_models(imports: str):
    run(imports + USE)
