"""Builds the optimizer: update rule, learning rate and weight decay of each parameter.

`adamw`: AdamW for all parameters (Loshchilov and Hutter 2019, arXiv:1711.05101). `muon`: Muon for the matrices inside blocks,
AdamW for embeddings, the head, norms and biases (`optim/muon.py`). Weight decay applies to tensors of two or more dimensions,
not to biases and norm weights. The training loop sets the learning rate before every update, so the rates given here never take
effect; `lr_scale` of a group is its rate relative to `optim.lr`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bardling.config import ModelConfig, OptimConfig
from bardling.extensions import OPTIMIZERS
from bardling.optim.adamw import AdamW
from bardling.optim.muon import MatrixExchange, Muon
from bardling.planning.parameter_shapes import matrix_rows, parameter_kind

FUSED_DEVICES = ("cpu", "cuda", "mps")  # with a PyTorch kernel that updates all tensors of a group at once

Parameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class OptimizerOptions:
    """What an optimizer may need in addition to its settings; Muon uses all of it."""

    device: torch.device  # of the parameters
    splits: Mapping[str, Sequence[int]] = field(default_factory=dict)  # rows of the parts of fused matrices, by name suffix
    rank: int = 0  # among the processes that share the optimizer's work
    world_size: int = 1  # number of these processes
    process_group: dist.ProcessGroup | None = None  # these processes; None for all
    compiled: bool = False  # compile the Newton-Schulz steps
    exchange: MatrixExchange | None = None  # of a sharded model


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    device: torch.device,
    **options: Any,
) -> torch.optim.Optimizer:
    """Return the optimizer selected by `config.name`.

    Args:
        named_parameters: from `module.named_parameters()`, already on `device`; frozen parameters are ignored.
        options: further fields of `OptimizerOptions`, such as `splits=row_splits(config)`.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: there is nothing to optimize")
    optimizer: torch.optim.Optimizer = OPTIMIZERS.get("optim.name", config.name)(
        trained, config, OptimizerOptions(device, **options)
    )
    return optimizer


def build_adamw(trained: Parameters, config: OptimConfig, options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW for all parameters."""
    groups = [_adamw_group(config, [p for _, p in trained if (p.dim() >= 2) == decays], decays) for decays in (True, False)]
    fused = options.device.type in FUSED_DEVICES
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def build_muon(trained: Parameters, config: OptimConfig, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Muon for the matrices inside blocks, AdamW for the rest."""
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "head": [], "other": [], "vector": []}
    for name, parameter in trained:
        kinds[parameter_kind(name, parameter.dim())].append(parameter)
    rates = {"embedding": config.embed_lr, "head": config.head_lr}
    common = {"betas": config.betas, "eps": config.eps, "fused": options.device.type in FUSED_DEVICES, "muon": False}
    muon = {"muon": True, "params": kinds["matrix"], "weight_decay": config.weight_decay, "momentum": config.momentum}
    groups = [{**muon, "lr": config.muon_lr, "lr_scale": config.muon_lr / config.lr}]
    for kind in ("embedding", "head", "other", "vector"):
        lr = rates.get(kind) or config.lr
        groups.append({**_adamw_group(config, kinds[kind], kind != "vector"), **common, "lr": lr, "lr_scale": lr / config.lr})
    # An unresolved 'auto' depends on the device type only.
    low = options.device.type == "cuda" if config.muon_precision == "auto" else config.muon_precision == "bfloat16"
    return Muon(
        [group for group in groups if group["params"]],
        splits={p: rows for name, p in trained for suffix, rows in options.splits.items() if f".{name}".endswith(f".{suffix}")},
        steps=config.muon_steps,
        dtype=torch.bfloat16 if low else torch.float32,
        cautious=config.cautious_decay,
        rank=options.rank,
        world_size=options.world_size,
        process_group=options.process_group,
        compiled=options.compiled,
        exchange=options.exchange,
    )


def _adamw_group(config: OptimConfig, parameters: list[nn.Parameter], decays: bool) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": 1.0}


def row_splits(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Rows of each part of the fused matrices of `model`, by name suffix: queries, keys, values; SwiGLU gate and values."""
    return {f"{layer}.weight": tuple(rows.values()) for layer, rows in matrix_rows(model).items() if len(rows) > 1}


def resolve_muon_precision(config: OptimConfig, precision: str) -> OptimConfig:
    """`config` with `muon_precision` = 'auto' resolved: bfloat16 if the run's `precision` is bfloat16, else float32."""
    if config.muon_precision != "auto":
        return config
    return dataclasses.replace(config, muon_precision="bfloat16" if precision == "bfloat16" else "float32")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update, multiplied by each group's `lr_scale` (default 1)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
