"""Decides how the processes of a run share its work, by the memory that it needs and that their devices have."""

import os
from dataclasses import replace

import torch

from bardling.config import RunConfig
from bardling.distributed.context import Context
from bardling.distributed.device import free_memory
from bardling.errors import UserError
from bardling.planning.batching import TrainPlan
from bardling.planning.layout import Layout, choose_layout, keeps_whole_gradients
from bardling.planning.memory import MemoryPlan, memory_plan
from bardling.training.build import Execution


def decide_layout(config: RunConfig, precision: str, context: Context) -> tuple[Layout, str]:
    """The layout of the processes, and why.

    Args:
        config: with the resolved model.

    Raises:
        UserError: the layout asked for is impossible, or a setting does not go with it.
    """
    per_node = os.environ.get("LOCAL_WORLD_SIZE", "")
    nodes_of = int(per_node) if per_node.isdecimal() and int(per_node) else context.world_size
    needed, memory = _needed(config, precision, context), _memory(context, nodes_of)
    layout, why = choose_layout(config.parallel, context.world_size, nodes_of, needed, memory, config.model)
    if layout.sharded:
        for key, used in (("tune.lora_rank", config.tune.lora_rank), ("fp8", config.fp8), ("cuda_graphs", config.cuda_graphs)):
            if used:
                remedy = "leave it out, or copy the model to each process with --parallel.layout ddp"
                raise UserError(f"{key} = {used} with the layout {layout}: shards do not support it: {remedy}")
    return layout, why


def with_layout(execution: Execution, config: RunConfig, layout: Layout, plan: TrainPlan, context: Context) -> Execution:
    """The execution with what a sharded model needs to know."""
    if not layout.sharded:
        return execution
    needed, memory = _needed(config, execution.precision.name, context), _memory(context, layout.world_size)
    passes = max(stage.accumulation for stage in plan.stages)
    whole = keeps_whole_gradients(config.parallel, layout, passes, needed, memory)
    offload = config.parallel.offload and context.device.type == "cuda"
    return replace(execution, reshard=config.parallel.reshard, whole_gradients=whole, offload=offload)


def _needed(config: RunConfig, precision: str, context: Context) -> MemoryPlan:
    """Memory of a process that holds the whole model, for passes of the size asked for, or of one sequence."""
    micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 1
    return memory_plan(config, config.model, micro_batch, precision, context.device.type)


def _memory(context: Context, processes: int) -> int | None:
    """Memory of the smallest device of all processes (bytes), of which `processes` share the memory of a host."""
    device = context.device
    if device.type == "cuda":
        size: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        free = free_memory(device)
        size = None if free is None else free // processes
    megabytes = 0 if size is None else size >> 20
    smallest = -context.largest(-megabytes)
    return (smallest << 20) or None
