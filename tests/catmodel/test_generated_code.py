"""A compiled or eager training step of every family sums its gradients in a fixed order on a GPU."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from catmodel.detection import Detector
from catmodel.detection.kinds import KINDS
from catmodel.fixed_order import upsample
from catmodel.semantic_fpn import SemanticFPN
from tests.catmodel.generated_code import adds_atomically, code_of, graphs_of
from tests.catmodel.small import images, small
from train.config import parse_config
from train.engine.deepspeed_engine import compile_settings
from train.tasks.base import build_task

# Operators that are not repeatable on a GPU: those that `torch.use_deterministic_algorithms` replaces or refuses, by
# its documentation, the ones to which they decompose, and the backward passes of PyTorch's fused attention.
VARYING = re.compile(
    r"\bscatter(?!_?\.value)|index_(add|copy|put|reduce)|\bput_?\b|embedding|_bag|kthvalue|median|mode\b|histc|"
    r"bincount|cumsum|ctc_loss|nll_loss2d|grid_sampler|unpool|unsafe_masked_index|"
    r"(max_pool|adaptive|fractional|avg_pool3d|upsample|pad[123]d|scaled_dot_product).*backward"
)

DRAWING = re.compile("bernoulli|rand|dropout|uniform")

DATA = {"data": {"path": "none"}}
DROPS = dict(drop_path_rate=0.2)
PATCHES = dict(patch_size=7, img_size=56)
STEPS = {
    "CAT": ("cat_tiny", 2, dict(cpsa_drop=0.2, ipsa_drop=0.1, patch_size=7, img_size=112)),  # 16 and 4 patches
    "CAT, ablations": ("cat_tiny", 2, dict(patch_embed="slice", shifted_windows=True, ape=False, cpsa_num_heads=7)),
    "CAT, many patches": ("cat_tiny", 1, dict(patch_size=2)),
    "CAT, dense": ("cat_tiny", 1, dict(features_only=True)),
    "PVT": ("pvt_tiny", 2, {}),
    "PVT, dense": ("pvt_tiny", 2, dict(features_only=True)),
    "CoTNet": ("cotnet50", 2, {}),
    "CoTNeXt": ("cotnext50", 1, {}),
    "SE-CoTNetD": ("se_cotnetd152", 3, {}),
    "CAT, segmentation": ("cat_tiny", 2, dict(features_only=True, **PATCHES)),
    "PVT, segmentation": ("pvt_tiny", 2, dict(features_only=True)),
    "CoTNet, segmentation": ("cotnet50", 2, dict(features_only=True)),
    "CAT, fcos": ("cat_tiny", 2, dict(features_only=True, **PATCHES)),
    "PVT, retinanet": ("pvt_tiny", 2, dict(features_only=True)),
    "CoTNet, atss": ("cotnet50", 2, dict(features_only=True)),
    "CAT, plain": ("cat_tiny", 2, dict(cpsa_drop=0.2, ipsa_drop=0.1, patch_size=7, img_size=112)),
    "PVT, plain": ("pvt_tiny", 2, {}),
    "CoTNet, plain": ("cotnet50", 2, {}),
}
# The only varying operators of a step. On a GPU PyTorch's fused attention has other names, and its gradient varies.
ADMITTED = {"PVT, plain": {"aten::_scaled_dot_product_flash_attention_for_cpu_backward"}}


def training_step(
    name: str, dtype: torch.dtype = torch.bfloat16, recompute: bool = False
) -> tuple[Callable[..., Tensor] | Tensor, ...]:
    """A step and its inputs. A dense model's images are larger than its positions' grid. "plain": without kernels.

    recompute: with activation checkpointing.
    """
    architecture, stages, settings = STEPS[name]
    settings = dict(settings)
    if "cpsa_num_heads" in settings:
        settings.update(PATCHES)
    model = small(architecture, stages, **DROPS, **settings)
    model.set_grad_checkpointing(recompute)
    model.set_kernels(not name.endswith("plain"))
    if name.endswith("segmentation"):
        return segmentation_step(model, dtype)
    if (kind := name.split(", ")[-1]) in KINDS:
        return detection_step(kind, model, dtype)
    model = model.train().to(dtype)
    side = settings.get("img_size", 64) + (14 if settings.get("features_only") else 0)

    def step(x: Tensor, targets: Tensor) -> Tensor:
        outputs = model(x)
        if isinstance(outputs, list):
            return sum(map_BCHW.float().square().mean() for map_BCHW in outputs)
        return F.cross_entropy(outputs.float(), targets)

    targets = torch.rand(4, 10, generator=torch.Generator().manual_seed(2))
    return step, images(architecture, 4, (side, side)).to(dtype), targets / targets.sum(1, keepdim=True)


def segmentation_step(backbone: nn.Module, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    model = SemanticFPN(backbone, 5, neck_channels=16, channels=8).train().to(dtype)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        logits = upsample(model(x), 4).permute(0, 2, 3, 1).flatten(0, 2)
        return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=255, reduction="sum") / labels.numel()

    labels = torch.randint(5, (2, 96, 64), generator=torch.Generator().manual_seed(2))
    return step, images("cat_tiny", 2, (96, 64)).to(dtype), labels.masked_fill(labels == 4, 255)


def detection_step(kind: str, backbone: nn.Module, dtype: torch.dtype) -> tuple[Callable[..., Tensor] | Tensor, ...]:
    """With the losses of the task."""
    config = parse_config({"task": {"name": "detection", "detector": kind}, "model": {"name": "cat_tiny"}, **DATA}, "")
    task = build_task(config, [""] * 5)
    model = Detector(kind, backbone, 5, neck_channels=16, head_channels=64, head_convs=1).train().to(dtype)
    grid, generator = model.grid(96, 64), torch.Generator().manual_seed(2)

    def step(x: Tensor, classes: Tensor, boxes: Tensor, places: Tensor, centerness: Tensor) -> Tensor:
        inputs = {"images": x, "classes": classes, "boxes": boxes, "places": places, "centerness": centerness}
        return sum(task.loss(model, inputs).values())

    classes = torch.randint(-1, 6, (2, len(grid)), generator=generator)
    sides = torch.rand(2, len(grid), 4, generator=generator) * 8 + 1
    boxes = grid.points.repeat(1, 2) + sides * torch.tensor([-1, -1, 1, 1])
    places = grid.points if grid.anchors is None else grid.anchors
    centerness = torch.rand(2, len(grid), generator=generator)
    return step, images("cat_tiny", 2, (96, 64)).to(dtype), classes, boxes, places, centerness


def varying(operator: torch._ops.OpOverload) -> bool:
    return VARYING.search(operator.name()) is not None


class Varying(TorchDispatchMode):
    """Records the operators that are not repeatable."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if varying(function):
            self.names.add(function.name())
        return function(*arguments, **(options or {}))


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_has_no_varying_operator(name, interpreted):
    """In the graphs that Inductor takes, after its decompositions."""
    used = {
        node.target.name()
        for graph, _ in graphs_of(*training_step(name))
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and varying(node.target)
    }
    assert used == ADMITTED.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CAT", "PVT", "CoTNet"])
def test_a_compiled_step_recomputes_activations_but_draws_once(name, interpreted):
    """In one graph each way, which neither reads nor sets the state of a generator."""
    kept, recomputed = (calls(graphs_of(*training_step(name, recompute=recompute))) for recompute in (False, True))
    assert len(recomputed[1]) > len(kept[1]), "the backward pass computes more"
    draws = [[call for call in graph if DRAWING.search(call)] for graph in recomputed]
    assert draws[0] and draws[0] == [call for call in kept[0] if DRAWING.search(call)]
    assert not draws[1] and not any("rng_state" in call for graph in recomputed for call in graph)


def calls(graphs: list[tuple[fx.GraphModule, list]]) -> list[list[str]]:
    return [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph, _ in graphs]


@pytest.mark.long
@pytest.mark.parametrize("name", STEPS)
def test_the_code_for_a_gpu_adds_nothing_atomically(name, interpreted):
    codes = code_of(graphs_of(*training_step(name)), compile_settings()["options"])
    assert len(codes) == 2, "forward and backward"
    for code in codes:
        assert "triton_poi_" in code, "there are kernels in it"
        assert not adds_atomically(code)


def test_an_atomic_addition_would_be_found():
    """In the graphs, in the code and in eager execution."""
    table, index = nn.Parameter(torch.randn(5, 2)), torch.tensor([0, 1, 0])

    def step(x: Tensor) -> Tensor:
        return (table[index] * x).sum()

    graphs = graphs_of(step, torch.randn(3, 2))
    assert any(
        isinstance(node.target, torch._ops.OpOverload) and varying(node.target) for node in graphs[1][0].graph.nodes
    )
    forward, backward = code_of(graphs, compile_settings()["options"])
    assert adds_atomically(backward) and not adds_atomically(forward)
    with Varying() as found:
        step(torch.randn(3, 2)).backward()
    assert found.names


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if "CAT, " in name else name for name in STEPS]
)
def test_an_eager_step_calls_no_varying_operator(name, interpreted):
    step, *inputs = training_step(name)
    with Varying() as found:
        step(*inputs).backward()
    assert found.names == ADMITTED.get(name, set())
