"""Parameter groups and optimizers."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from train.config import ConfigError
from train.config_sections import OptimizerConfig
from train.engine.muon import Muon

IMAGE_CHANNELS = 3
OUTPUTS = {"head", "fc", "conv_seg", "conv_cls", "conv_reg", "conv_centerness"}  # names of last layers


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, no_decay: Sequence[str] | None = None
) -> list[dict]:
    """Two parameter groups: with and without weight decay.

    1-D parameters (biases, norms) and those named by `model.no_weight_decay()` have none; or, if `no_decay` is given,
    those whose name contains one of its fragments. With `layer_decay` below 1, two groups for each layer l of the model
    (`model.layer_of`), whose learning rate is multiplied by their `lr_scale`, layer_decay ** (last layer - l) (BEiT,
    arXiv 2106.08254).

    Raises ConfigError for a fragment of no parameter's name.
    """
    if no_decay is None:
        exempt = model.no_weight_decay() | {name for name, value in model.named_parameters() if value.ndim <= 1}
    else:
        names = [name for name, _ in model.named_parameters()]
        exempt = {name for name in names if any(fragment in name for fragment in no_decay)}
        for fragment in no_decay:
            if not any(fragment in name for name in names):
                raise ConfigError(f"optimizer.no_decay: no parameter's name contains {fragment!r}; leave it out")
    layers = {name: model.layer_of(name) if layer_decay < 1 else 0 for name, _ in model.named_parameters()}
    last = max(layers.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[layers[name], name in exempt].append(parameter)
    return [
        {
            "params": groups[layer, bare],
            "weight_decay": 0.0 if bare else weight_decay,
            "lr_scale": layer_decay ** (last - layer),
        }
        for layer, bare in sorted(groups)
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, or Muon, with a learning rate of 0: `Engine.step` sets it before every step."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.no_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "muon":
        hidden = hidden_matrices(model)
        parts = [
            {**group, "params": [p for p in group["params"] if (p in hidden) == matrices], "matrices": matrices}
            for group in groups
            for matrices in (True, False)
        ]
        groups = [part for part in parts if part["params"]]
        return Muon(groups, lr=0.0, momentum=config.momentum, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon trains: of linear layers and ungrouped convolutions, but for the convolution that reads the
    image and the layers that give the network's outputs.
    """
    found = set()
    for name, layer in model.named_modules():
        reads_image = isinstance(layer, nn.Conv2d) and layer.in_channels == IMAGE_CHANNELS
        hidden = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if hidden and not reads_image and name.rpartition(".")[2] not in OUTPUTS:
            found.add(layer.weight)
    return found


def initial_state(optimizer: torch.optim.Optimizer, group: dict, master: Tensor) -> dict[str, Tensor]:
    """Initial state of `optimizer` for one fp32 tensor of a parameter group, which torch would create lazily."""
    if isinstance(optimizer, torch.optim.AdamW) and not group.get("matrices"):
        # Fused AdamW keeps its step count on the parameter's device.
        count = torch.zeros((), dtype=torch.float32, device=master.device)
        return {"step": count, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
    return {"momentum_buffer": torch.zeros_like(master)}
