"""Muon (Jordan et al., 2024): momentum SGD with orthogonalised updates for matrices, and AdamW for other parameters."""

import itertools
from collections import defaultdict

import torch
from torch import Tensor

# Newton-Schulz iteration X ← aX + (bA + cA²)X with A = XXᵀ. With Jordan's coefficients (a, b, c), five steps bring all
# singular values to between about 0.7 and 1.2, which is close enough to 1 here.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.AdamW):
    """Applies Muon to parameter groups with `matrices: True`, and fused AdamW to the others.

    A convolution's weight [out, in, height, width] is the matrix [out, in * height * width].

    Muon uses Nesterov momentum. Its updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them the size of
    AdamW's (Liu et al., arXiv 2502.16982, section 2.2), so that both share one learning rate. It needs whole matrices:
    partitioned parameters (ZeRO) do not work.

    As in torch's fused AdamW, two optional scalars on the device control a step: gradients are divided by `grad_scale`,
    and nothing changes if `found_inf` is 1.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], lr: float, momentum: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters from their gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict) -> None:
        """All matrices together, as one flat tensor each of gradients, momentum and updates: few launches on a GPU."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        parameters.sort(key=lambda parameter: tuple(parameter.shape))  # equal shapes lie together in the flat tensors
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters]).float()
        momentum = torch.cat([buffer.flatten() for buffer in buffers])
        lr = torch.full((), group["lr"], device=gradient.device)
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        if self.found_inf is not None:  # skip by a learning rate of 0 and the momentum as its own gradient
            gradient = torch.where(self.found_inf.bool(), momentum, gradient)
            lr = lr * (1 - self.found_inf)
        momentum.lerp_(gradient, 1 - self.momentum)
        update = torch.lerp(gradient, momentum, self.momentum)
        shapes = [parameter.shape for parameter in parameters]
        torch._foreach_copy_(buffers, _views(momentum, shapes))
        stacks = _stacks(update, [(shape[0], shape[1:].numel()) for shape in shapes])
        orthogonalise(stacks, padded=update.is_cuda)
        torch._foreach_mul_(stacks, [-0.2 * max(stack.shape[1:]) ** 0.5 for stack in stacks])
        update *= lr
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, _views(update, shapes))


def orthogonalise(stacks: list[Tensor], padded: bool) -> None:
    """Replace every matrix of `stacks` ([n, rows, columns] fp32 each) by its approximate UVᵀ (`orthogonalised`).

    padded: matrices whose shorter sides are equal go together, the longer sides filled with zeros, which change
    nothing but the order of sums. On a GPU the fewer launches save more than the zeros cost.
    """
    groups = defaultdict(list)
    for stack in stacks:
        wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
        groups[wide.shape[1] if padded else wide.shape[1:]].append(wide)
    for wide in groups.values():
        longest, counts = max(stack.shape[2] for stack in wide), [len(stack) for stack in wide]
        together = wide[0].new_zeros(sum(counts), wide[0].shape[1], longest)
        for stack, part in zip(wide, together.split(counts), strict=True):
            part[:, :, : stack.shape[2]].copy_(stack)
        for stack, part in zip(wide, orthogonalised(together).split(counts), strict=True):
            stack.copy_(part[:, :, : stack.shape[2]])


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximate UVᵀ of the singular value decompositions USVᵀ of `matrices`, [n, rows, columns] fp32.

    On a GPU the iteration runs in bf16, which is accurate enough.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The weights of these shapes that lie one after another in a flat tensor."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _stacks(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Matrices of these shapes that lie one after another in a flat tensor, runs of equal shape as one tensor [n, rows,
    columns].
    """
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    parts = flat.split([count * rows * columns for (rows, columns), count in runs])
    return [part.view(count, *shape) for part, (shape, count) in zip(parts, runs, strict=True)]
