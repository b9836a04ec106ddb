import pytest
import torch

import catmodel
from train.config import ConfigError, parse_config
from train.engine.muon import Muon, orthogonalise, orthogonalised
from train.engine.optimizer import hidden_matrices


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 96, 32), (4, 16, 48)])
def test_singular_values_come_near_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    found = orthogonalised(u * torch.linspace(1, 0.1, min(shape[1:])) @ v)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.3
    # The singular vectors do not change: in their basis the result is diagonal.
    basis = u.mT @ found @ v.mT
    assert (basis - torch.diag_embed(basis.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_matrices_take_muons_step_and_the_rest_adamws():
    torch.manual_seed(0)
    matrix, bias, reference = (
        torch.randn(8, 6, requires_grad=True),
        torch.randn(5, requires_grad=True),
        torch.zeros(5, requires_grad=True),
    )
    reference.data.copy_(bias.data)
    before = matrix.detach().clone()
    groups = [
        {"params": [matrix], "weight_decay": 0.5, "matrices": True},
        {"params": [bias], "weight_decay": 0.0, "matrices": False},
    ]
    optimizer = Muon(groups, lr=0.1, momentum=0.9, betas=(0.9, 0.99), eps=1e-8)
    optimizer.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
    adamw = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, fused=True)
    matrix.grad, bias.grad = torch.randn(8, 6), torch.randn(5)
    reference.grad = bias.grad.clone()
    optimizer.step(), adamw.step()
    # After one step the momentum is proportional to the gradient, and orthogonalising removes the factor.
    update = orthogonalised(matrix.grad[None])[0]
    torch.testing.assert_close(
        matrix.detach(), before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * update, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(bias, reference)


def test_matrices_of_several_shapes_are_orthogonalised_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16, 16), (3, 16, 48), (1, 40, 16), (2, 24, 8), (1, 8, 8)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for padded in (False, True):
        stacks = [matrix.clone() for matrix in matrices]
        orthogonalise(stacks, padded)
        for stack, matrix in zip(stacks, matrices, strict=True):
            torch.testing.assert_close(stack, orthogonalised(matrix), rtol=1e-4, atol=1e-5)


def test_a_step_equals_the_same_steps_of_each_matrix_alone():
    """Shapes in any order; with a divisor of the gradients, and with a step that is skipped."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (4, 12), (8, 6), (6, 8), (3, 3), (4, 12), (4, 3, 2, 2), (4, 12, 1, 1)]
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    gradients[1][2][0, 0] = float("nan")

    def trained(numbers: list[int]) -> list[torch.Tensor]:
        matrices = [first[number].clone().requires_grad_() for number in numbers]
        optimizer = Muon(
            [{"params": matrices, "weight_decay": 0.1, "matrices": True}, {"params": [], "matrices": False}],
            lr=0.05,
            momentum=0.9,
            betas=(0.9, 0.99),
            eps=1e-8,
        )
        for matrix in matrices:
            optimizer.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
        for step, of_step in enumerate(gradients):
            for matrix, number in zip(matrices, numbers, strict=True):
                matrix.grad = of_step[number].clone()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == 1))
            optimizer.step()
        return matrices

    together = trained(list(range(len(shapes))))
    for number, matrix in enumerate(together):
        assert matrix.isfinite().all()
        torch.testing.assert_close(matrix, trained([number])[0], rtol=1e-5, atol=1e-6)


def test_a_convolution_takes_the_step_of_its_matrix():
    """[out, in, height, width] as [out, in * height * width]."""
    generator = torch.Generator().manual_seed(0)
    first, gradient = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
    found = []
    for shape in ((6, 4, 3, 3), (6, 36)):
        weight = first.clone().view(shape).requires_grad_()
        optimizer = Muon([{"params": [weight], "weight_decay": 0.1, "matrices": True}], 0.1, 0.9, (0.9, 0.99), 1e-8)
        optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
        weight.grad = gradient.view(shape)
        optimizer.step()
        found.append(weight.detach().flatten())
    assert torch.equal(*found) and not torch.equal(found[0], first.flatten())


def test_muon_trains_hidden_layers_only():
    """Not what reads the image or gives the outputs, and no grouped convolution."""
    cases = {
        catmodel.create_segmenter("cat_tiny", 5): (
            {"backbone.layers.0.pre_ipsa_blocks.0.attn.proj", "neck.fpn_convs.0", "head.scale_heads.0.0.conv"},
            {"backbone.patch_embed.proj", "head.conv_seg"},
        ),
        catmodel.create_detector("fcos", "cotnet50", 5): (
            {"backbone.layer1.0.conv1", "backbone.layer1.0.conv2.conv1x1.0"},
            {"backbone.conv1", "backbone.layer1.0.conv2.key_embed.0"}
            | {"head.conv_cls", "head.conv_reg", "head.conv_centerness"},
        ),
        catmodel.create_model("cotnet50"): ({"layer1.0.conv1", "layer4.2.conv3"}, {"conv1", "fc"}),
        catmodel.create_model("pvt_tiny"): ({"patch_embed2.proj"}, {"patch_embed1.proj", "head"}),
    }
    for model, (hidden, others) in cases.items():
        found = hidden_matrices(model)
        names = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight in found}
        assert hidden <= names and not others & names, names
        assert others <= {name for name, _ in model.named_modules()}


def test_muon_needs_whole_matrices():
    tree = {"model": {"name": "cat_nano"}, "data": {"path": "x"}, "optimizer": {"name": "muon"}, "zero": {"stage": 1}}
    with pytest.raises(ConfigError, match="optimizer.name=muon needs zero.stage=0, not 1"):
        parse_config(tree, "test")
