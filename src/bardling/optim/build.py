"""The optimizer of a model's parameters: which rule, learning rate and decay each of them gets.

`adamw`: AdamW for everything (Loshchilov and Hutter 2019, arXiv:1711.05101). `muon`: Muon for the matrices inside blocks, AdamW
for embeddings, the head, norms and biases (`optim/muon.py`). Only tensors of two or more dimensions decay; biases and norm
gains do not. The learning rate is set by the training loop before every update, so the rates given here never take effect:
a group's `lr_scale` says how its own is related to `optim.lr`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bardling.config import ModelConfig, OptimConfig
from bardling.optim.adamw import AdamW
from bardling.optim.kinds import kind_of
from bardling.optim.muon import Muon

# Devices for which PyTorch has a kernel that updates all tensors of a group at once.
FUSED_DEVICES = ("cpu", "cuda", "mps")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    device: torch.device,
    *,
    splits: Mapping[str, Sequence[int]] | None = None,
    rank: int = 0,
    world_size: int = 1,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer that `config.name` asks for.

    Args:
        named_parameters: as `module.named_parameters()` gives them, already on `device`; frozen ones are left out.
        device: where the parameters are.
        splits: with Muon, rows of each part of matrices that hold several, by the end of their names (`row_splits`).
        rank, world_size: with Muon, this process among those that share its work.
        compiled: with Muon, compile its Newton-Schulz steps.

    Raises:
        ValueError: there is nothing to train.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: there is nothing to optimize")
    if config.name == "adamw":
        groups = [_adamw_group(config, [p for _, p in trained if (p.dim() >= 2) == decays], decays) for decays in (True, False)]
        fused = device.type in FUSED_DEVICES
        return AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
        )
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "head": [], "other": [], "vector": []}
    for name, parameter in trained:
        kinds[kind_of(name, parameter.dim())].append(parameter)
    rates = {"embedding": config.embed_lr, "head": config.head_lr}
    common = {"betas": config.betas, "eps": config.eps, "fused": device.type in FUSED_DEVICES, "muon": False}
    muon = {"muon": True, "params": kinds["matrix"], "weight_decay": config.weight_decay, "momentum": config.momentum}
    groups = [{**muon, "lr": config.muon_lr, "lr_scale": config.muon_lr / config.lr}]
    for kind in ("embedding", "head", "other", "vector"):
        lr = rates.get(kind) or config.lr
        groups.append({**_adamw_group(config, kinds[kind], kind != "vector"), **common, "lr": lr, "lr_scale": lr / config.lr})
    return Muon(
        [group for group in groups if group["params"]],
        splits={p: rows for name, p in trained for end, rows in (splits or {}).items() if f".{name}".endswith(f".{end}")},
        steps=config.muon_steps,
        dtype=_muon_dtype(config, device),
        cautious=config.cautious_decay,
        rank=rank,
        world_size=world_size,
        compiled=compiled,
    )


def _adamw_group(config: OptimConfig, parameters: list[nn.Parameter], decays: bool) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": 1.0}


def row_splits(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Rows of each part of the fused matrices of `model`, by the end of their names: queries, keys, values; gate, gated."""
    made = model.architecture
    splits: dict[str, tuple[int, ...]] = {"attn.c_attn.weight": (made.query_width, made.kv_width, made.kv_width)}
    if made.mlp == "swiglu":
        splits["mlp.c_fc.weight"] = (made.mlp_hidden, made.mlp_hidden)
    return splits


def settle_muon_precision(config: OptimConfig, precision: str) -> OptimConfig:
    """`config` with `muon_precision` decided: bfloat16 in a run whose matrix products are computed in it, else float32.

    Args:
        precision: the run's, decided: 'float32', 'bfloat16' or 'float16'.
    """
    if config.muon_precision != "auto":
        return config
    return dataclasses.replace(config, muon_precision="bfloat16" if precision == "bfloat16" else "float32")


def _muon_dtype(config: OptimConfig, device: torch.device) -> torch.dtype:
    """The decided format; where nobody decided, one that is right on every device of a kind."""
    if config.muon_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.muon_precision == "bfloat16" else torch.float32


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next update; a group's `lr_scale` (1 when absent) multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
