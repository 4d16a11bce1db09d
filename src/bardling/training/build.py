"""The one place that assembles a training run: model, optimizer, gradient scaler, EMA and wrapped forward.

`train`, `resume`, `fit_batches`, `bench`, `verify` and the benchmarks all call `build`. The order matters: the model is on its
device before the optimizer is created, and is wrapped (compiled, distributed) last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bardling.config import ModelConfig, OptimConfig, TuneConfig
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.distributed.wrap import wrap
from bardling.model.gpt import GPT
from bardling.model.layers import use_fp8
from bardling.model.lora import add_adapters
from bardling.optim.build import build_optimizer, row_splits
from bardling.optim.ema import Ema
from bardling.training.objective import Forward
from bardling.training.state import TrainState


@dataclass(frozen=True)
class Execution:
    """How the model is computed during training."""

    precision: Precision
    compiled: bool = False
    cuda_graphs: bool = False  # replay compiled passes as CUDA graphs
    fp8: bool = False  # compute linear layers of blocks in float8
    recompute: bool = False  # recompute the activations of blocks in the backward pass


@dataclass(frozen=True)
class Assembly:
    state: TrainState
    forward: Forward  # the model, compiled and distributed


def build(
    model: ModelConfig | GPT,
    optim: OptimConfig,
    execution: Execution,
    context: Context,
    *,
    seed: int | None = 0,
    weights: Mapping[str, Tensor] | None = None,
    tune: TuneConfig | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Assembly:
    """Assemble a model and everything needed to train it, at step 0.

    Args:
        model: a configuration with its vocabulary size, or a model that is already on its device.
        optim: the optimizer (unless `optimizer` is given) and the EMA.
        seed: of the initial weights; None leaves them undefined, for a caller that restores a checkpoint.
        weights: a `GPT` state dict to start from instead.
        tune: if it has a LoRA rank, train adapters instead of the weights; `seed` is also that of the adapters.
        optimizer: over the parameters of `model`, if that is a model.
    """
    if isinstance(model, GPT):
        network = model
        network.recompute = network.recompute or execution.recompute
    else:
        network = build_model(model, execution, context.device, seed=seed if weights is None else None)
    if weights is not None:
        network.load_state_dict(weights)
    if tune is not None and tune.lora_rank:
        add_adapters(network, tune, seed or 0)
    if optimizer is None:
        optimizer = build_optimizer(
            network.named_parameters(),
            optim,
            context.device,
            splits=row_splits(network.config),
            rank=context.data_rank,
            world_size=context.data_size,
            process_group=context.group(),
            compiled=execution.compiled,
        )
    state = TrainState(network, optimizer)
    if execution.precision.needs_scaler:
        state.scaler = torch.amp.GradScaler(context.device.type)
    if optim.ema_decay:
        state.ema = Ema(dict(network.named_parameters()), optim.ema_decay)
    forward = wrap(network, compiled=execution.compiled, cuda_graphs=execution.cuda_graphs, context=context)
    return Assembly(state, cast(Forward, forward))


def build_model(model: ModelConfig, execution: Execution, device: torch.device, *, seed: int | None) -> GPT:
    """The model on its device, set up for `execution`."""
    network = GPT(model, seed=seed)
    use_fp8(network.transformer.h, execution.fp8)
    network.recompute = execution.recompute
    return network.to(device)
