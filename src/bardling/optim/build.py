"""AdamW over a model's parameters: decay where it belongs, the fused kernel where there is one.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Only tensors of two or more dimensions (matrices, embeddings) decay;
biases and norm gains do not. The learning rate is set by the training loop before every update, so the rate given here never
takes effect.
"""

from collections.abc import Iterable

import torch
from torch import nn

from bardling.config import OptimConfig

# Devices for which PyTorch has a kernel that updates all tensors of a group at once.
FUSED_DEVICES = ("cpu", "cuda", "mps")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW with two groups: decayed (two or more dimensions) and not decayed.

    Args:
        named_parameters: as `module.named_parameters()` gives them, already on `device`; frozen ones are left out.
        device: where the parameters are.

    Raises:
        ValueError: there is nothing to train.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: there is nothing to optimize")
    decayed = [parameter for _, parameter in trained if parameter.dim() >= 2]
    plain = [parameter for _, parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_scale": 1.0}
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type in FUSED_DEVICES)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next update; a group's `lr_scale` (1 when absent) multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
