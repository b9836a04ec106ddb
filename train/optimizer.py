"""Parameter groups, and the optimizers of the papers as torch has them."""

import torch
from torch import Tensor, nn

from train.config import OptimizerConfig
from train.muon import Muon


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: with weight decay, and without for 1-D parameters (biases, norms) and those `model.no_weight_decay()` names."""
    exempt = model.no_weight_decay()
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim <= 1 or name in exempt
            (undecayed if bare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, or Muon. The learning rate starts at 0: the trainer sets it before every step.

    (DeepSpeed takes a step with zero gradients while it starts at ZeRO 0; at lr 0 that step changes no weight.)
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "muon":
        hidden = {layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"}
        decayed, undecayed = groups
        matrices = {"params": [p for p in decayed["params"] if p in hidden], "weight_decay": config.weight_decay, "matrices": True}
        decayed["params"] = [p for p in decayed["params"] if p not in hidden]
        groups = [matrices, {**decayed, "matrices": False}, {**undecayed, "matrices": False}]
        return Muon(groups, lr=0.0, momentum=config.momentum, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)


def initial_state(optimizer: torch.optim.Optimizer, group: dict, master: Tensor) -> dict[str, Tensor]:
    """The optimizer's state for one fp32 tensor of a parameter group before its first step, as torch would make it lazily."""
    if isinstance(optimizer, torch.optim.AdamW) and not group.get("matrices"):
        # A fused AdamW counts its steps on the parameter's device.
        count = torch.zeros((), dtype=torch.float32, device=master.device)
        return {"step": count, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
    return {"momentum_buffer": torch.zeros_like(master)}
