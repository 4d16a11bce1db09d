"""The one place that assembles a training run: model, optimizer, gradient scaler, EMA and wrapped forward.

`train`, `resume`, `fit_batches`, `bench`, `verify` and the benchmarks all call `build`. The order matters: the model is on its
device before the optimizer is created, and is wrapped (compiled, distributed) last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from bardling.config import ModelConfig, OptimConfig, TuneConfig
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.distributed.matrices import ShardedMatrices
from bardling.distributed.pipeline import Pipeline, Stage, StageParameters, build_stage
from bardling.distributed.sharding import MODEL_AXES, Shards, initialize, shard
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
    reshard: bool = True  # with shards: free gathered weights between a block's forward and backward pass
    whole_gradients: bool = False  # with shards: reduce gradients only after the last pass of a step
    offload: bool = False  # with shards: keep them in host memory
    schedule: Literal["1f1b", "gpipe"] = "1f1b"  # of a pipeline


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
    shards: Shards | None = None
    if isinstance(model, GPT):
        network = model
        network.recompute = network.recompute or execution.recompute
    elif any(context.size(axis) > 1 for axis in MODEL_AXES):
        network, shards = build_sharded(model, execution, context, seed=seed if weights is None else None, weights=weights)
    else:
        network = build_model(model, execution, context.device, seed=seed if weights is None else None)
    if weights is not None and shards is None:
        network.load_state_dict(weights)
    if tune is not None and tune.lora_rank:
        add_adapters(network, tune, seed or 0)
    trained = dict(network.named_parameters()) if shards is None else shards.parameters
    if optimizer is None:
        optimizer = build_optimizer(
            trained.items(),
            optim,
            context.device,
            splits=row_splits(network.config),
            rank=context.data_rank,
            world_size=context.data_size,
            process_group=context.group(),
            compiled=execution.compiled,
            exchange=None if shards is None or isinstance(shards, StageParameters) else ShardedMatrices(shards),
        )
    state = TrainState(network, optimizer, shards=shards)
    if execution.precision.needs_scaler:
        state.scaler = torch.amp.GradScaler(context.device.type) if shards is None else shards.gradient_scaler(context.device)
    if optim.ema_decay:
        state.ema = Ema(trained, optim.ema_decay)
    if isinstance(network, Stage):
        return Assembly(state, cast(Forward, Pipeline(network, execution.schedule)))
    if shards is not None:
        return Assembly(state, cast(Forward, network))
    forward = wrap(network, compiled=execution.compiled, cuda_graphs=execution.cuda_graphs, context=context)
    return Assembly(state, cast(Forward, forward))


def build_sharded(
    model: ModelConfig,
    execution: Execution,
    context: Context,
    *,
    seed: int | None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[GPT, Shards]:
    """A model of which each process holds a part; with the given weights, those of `seed`, or undefined ones."""
    network: GPT
    shards: Shards

    def empty() -> GPT:
        network = GPT(model, seed=None)
        network.recompute = execution.recompute
        return network

    if context.size("pipeline") > 1:
        network, shards = build_stage(model, context, recompute=execution.recompute, compiled=execution.compiled)
    else:
        network, shards = shard(
            empty,
            context,
            precision=execution.precision.name,
            compiled=execution.compiled,
            reshard=execution.reshard,
            offload=execution.offload,
        )
    if weights is not None:
        shards.load(weights.__getitem__)
    elif seed is not None:
        initialize(shards, model, seed)
    return network, shards


def build_model(model: ModelConfig, execution: Execution, device: torch.device, *, seed: int | None) -> GPT:
    """The model on its device, set up for `execution`."""
    network = GPT(model, seed=seed)
    use_fp8(network.transformer.h, execution.fp8)
    network.recompute = execution.recompute
    return network.to(device)
