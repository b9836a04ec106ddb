"""What the task exports, as files that another program builds again."""

import pytest
import torch
from safetensors.torch import load_file

import catmodel
from catmodel.export import export
from catmodel.pretrained import about
from train.config import load_config
from train.tasks.base import build_task


def _export(task, state, folder, features=False) -> float:
    """The largest difference between the file and the network."""
    model, description = task.export(state, features)
    return export(model, str(folder / "m.safetensors"), description)


@pytest.fixture(scope="module")
def task(segment_config):
    return build_task(load_config(segment_config), [f"class {i}" for i in range(6)])


def test_logits_have_the_images_size(task, tmp_path):
    state = task.initial_model().state_dict()
    assert _export(task, state, tmp_path) == 0
    described = about(tmp_path / "m.safetensors")
    model = catmodel.create_segmenter(**described["model"]).eval()
    model.load_state_dict(load_file(tmp_path / "m.safetensors"))
    trained = task.build_model().eval()
    trained.load_state_dict(state)
    images = torch.randn(1, 3, 70, 101)
    with torch.no_grad():
        logits = trained(images)
        found = model(images)
    assert logits.shape == (1, 6, -(-70 // trained.stride), -(-101 // trained.stride)) and found.shape == (
        1,
        6,
        70,
        101,
    )
    torch.testing.assert_close(found, torch.nn.functional.interpolate(logits, (70, 101), mode="bilinear"))
    assert described["classes"] == list(task.classes) and described["mean"] == list(task.config.augment.mean)


def test_features_are_the_backbones(task, tmp_path):
    network = task.initial_model().eval()
    assert _export(task, network.state_dict(), tmp_path, features=True) == 0
    model = catmodel.create_model(**about(tmp_path / "m.safetensors")["model"]).eval()
    model.load_state_dict(load_file(tmp_path / "m.safetensors"))
    images = torch.randn(1, 3, 70, 101)
    with torch.no_grad():
        assert all(map(torch.equal, model(images), network.backbone(images)))
