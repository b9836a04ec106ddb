"""Muon (Jordan et al., 2024): momentum SGD with orthogonalised updates for matrices, and AdamW for other parameters."""

from collections import defaultdict

import torch
from torch import Tensor

# Newton-Schulz iteration X ← aX + (bA + cA²)X with A = XXᵀ. With Jordan's coefficients (a, b, c), five steps bring all
# singular values to between about 0.7 and 1.2, which is close enough to 1 here.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.AdamW):
    """Applies Muon to parameter groups with `matrices: True` (2-D parameters only), and fused AdamW to the others.

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
        for parameters in _by_shape([parameter for parameter in group["params"] if parameter.grad is not None]):
            gradients = [parameter.grad.float() for parameter in parameters]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            lr = torch.full((), group["lr"], device=parameters[0].device)
            if self.grad_scale is not None:
                torch._foreach_div_(gradients, self.grad_scale)
            if self.found_inf is not None:  # skip by a learning rate of 0 and the momentum as its own gradient
                skip = self.found_inf.bool()
                gradients = [
                    torch.where(skip, buffer, gradient) for buffer, gradient in zip(buffers, gradients, strict=True)
                ]
                lr = lr * (1 - self.found_inf)
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            updates = orthogonalised(torch.stack(torch._foreach_lerp(gradients, buffers, self.momentum)))
            updates *= lr * (-0.2 * max(updates.shape[1:]) ** 0.5)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates.unbind()))


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
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group parameters by shape; each group is processed as one batch."""
    groups = defaultdict(list)
    for parameter in parameters:
        groups[parameter.shape].append(parameter)
    return list(groups.values())
