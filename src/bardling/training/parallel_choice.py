"""Decides how the processes of a run share its work, by the memory that it needs and that their devices have."""

from dataclasses import replace

from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.planning.batching import TrainPlan
from bardling.planning.layout import (
    Layout,
    check_context,
    check_pipeline,
    choose_layout,
    frees_weights,
    given_layout,
    idle_fraction,
    keeps_whole_gradients,
)
from bardling.planning.memory import MemoryPlan, memory_plan
from bardling.training.build import Execution
from bardling.training.facts import Facts


def decide_layout(config: RunConfig, precision: str, facts: Facts) -> tuple[Layout, str]:
    """The layout of the processes, and why.

    Args:
        config: with the resolved model.

    Raises:
        UserError: the layout asked for is impossible, or a setting does not go with it.
    """
    context = facts.context
    if context.world_size == 1:
        return given_layout(config.parallel, 1), "one process"
    needed = _needed(config, precision, facts)
    layout, why = choose_layout(
        config.parallel, context.world_size, facts.processes_per_node, needed, facts.device_memory, config.model
    )
    check_pipeline(config.model, layout)
    check_context(config.model, layout)
    if layout.divided:
        for key, used in (("tune.lora_rank", config.tune.lora_rank), ("fp8", config.fp8), ("cuda_graphs", config.cuda_graphs)):
            if used:
                remedy = "leave it out, or copy the model to each process with --parallel.layout ddp"
                raise UserError(f"{key} = {used} with the layout {layout}: a divided model does not support it: {remedy}")
    return layout, why


def with_layout(execution: Execution, config: RunConfig, layout: Layout, plan: TrainPlan, facts: Facts) -> Execution:
    """The execution with what a divided model needs to know."""
    execution = replace(execution, schedule=config.parallel.schedule)
    if layout.shard == layout.tensor == layout.context == 1:
        return execution
    needed = _needed(config, execution.precision.name, facts)
    passes = max(stage.accumulation for stage in plan.stages)
    whole = keeps_whole_gradients(config.parallel, layout, passes, needed, facts.device_memory)
    frees = frees_weights(config.parallel, layout, needed, facts.device_memory, whole_gradients=whole)
    offload = config.parallel.offload and facts.context.device.type == "cuda"
    return replace(execution, reshard=frees, whole_gradients=whole, offload=offload)


def idle_stages(layout: Layout, plan: TrainPlan) -> list[str]:
    """A warning if steps have fewer passes than a pipeline has stages."""
    passes = min(stage.accumulation for stage in plan.stages)
    if passes >= layout.pipeline:
        return []
    idle = f"with {passes} passes per step, a stage is idle {idle_fraction(layout.pipeline, passes):.0%} of the time"
    return [f"parallel.pipeline = {layout.pipeline}: {idle}: set a smaller train.micro_batch"]


def _needed(config: RunConfig, precision: str, facts: Facts) -> MemoryPlan:
    """Memory of a process that holds the whole model, for passes of the size asked for, or of one sequence."""
    micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 1
    return memory_plan(config, config.model, micro_batch, precision, facts.context.device.type)
