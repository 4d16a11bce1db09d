"""Layout of a run's processes: the sizes of the device mesh axes, given or chosen by memory."""

import math
from dataclasses import astuple, dataclass

from bardling.config import ModelConfig, ParallelConfig
from bardling.errors import UserError
from bardling.planning.memory import MemoryPlan

AXES = ("replicate", "shard", "tensor", "pipeline")
"""Mesh axes, outermost first: neighbouring ranks, which have the fastest links, differ along the innermost axes."""

DATA_AXES = ("replicate", "shard")
"""Axes along which processes train on different samples."""

_USABLE = 0.9  # of a device's memory; the rest goes to fragmentation and libraries


@dataclass(frozen=True)
class Layout:
    """Processes along each axis of the mesh; an unused axis has size 1. So far, runs do not use `tensor`."""

    replicate: int = 1  # each holds all parameters (DDP)
    shard: int = 1  # each holds a shard of every parameter (FSDP2)
    tensor: int = 1  # each computes a fraction of every layer
    pipeline: int = 1  # each computes some of the layers

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return astuple(self)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_size(self) -> int:
        """Number of processes that train on different samples."""
        return self.replicate * self.shard

    @property
    def divided(self) -> bool:
        """Whether a process holds only a part of the model."""
        return self.data_size // self.replicate * self.tensor * self.pipeline > 1

    def __str__(self) -> str:
        kinds = {(False, False): "one process", (True, False): "DDP", (False, True): "FSDP2", (True, True): "HSDP"}
        name = kinds[self.replicate > 1, self.shard > 1]
        if self.pipeline > 1:
            name = f"{name} of pipelines" if self.data_size > 1 else "pipeline"
        used = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)
        return f"{name} ({used})" if used else name


def choose_layout(
    config: ParallelConfig, processes: int, per_node: int, needed: MemoryPlan, memory: int | None
) -> tuple[Layout, str]:
    """The layout of all processes, and why.

    Args:
        per_node: processes on each machine.
        needed: memory of one process that holds the whole model.
        memory: that of a process's device (bytes); None if unknown.

    Raises:
        UserError: the sizes given do not fit the number of processes.
    """
    if config.replicate is not None or config.shard is not None or config.pipeline > 1:
        return _given(config, processes), "as configured"
    if config.layout != "auto" or processes == 1:
        whole = config.layout != "fsdp"
        return Layout(replicate=processes) if whole else Layout(shard=processes), "as configured"
    if memory is None:
        return Layout(replicate=processes), "the memory of the device is unknown"
    state, limit = _state(needed), _USABLE * memory
    sizes = f"{_gb(state)} of weights, gradients and optimizer state and {_gb(needed.activations.total)} of activations"
    if state + needed.activations.total <= limit:
        return Layout(replicate=processes), f"{sizes} fit in {_gb(memory)}"
    nodes = processes // per_node if processes % per_node == 0 else 1
    within = Layout(replicate=nodes, shard=processes // nodes)
    fits = sharded_bytes(needed, within.shard) <= limit
    chosen = within if nodes > 1 and fits else Layout(shard=processes)
    share = f"{_gb(sharded_bytes(needed, chosen.shard))} on each of {chosen.shard} processes"
    return chosen, f"{sizes} do not fit in {_gb(memory)}, sharded {share}"


def sharded_bytes(needed: MemoryPlan, shards: int, *, whole_gradients: bool = False, whole_weights: bool = False) -> int:
    """Memory of one process if the state is divided among `shards`; the activations include what is gathered for a pass."""
    whole = needed.gradients * whole_gradients + needed.weights * whole_weights
    return int(_state(needed) / shards + whole * (1 - 1 / shards) + needed.activations.total)


def keeps_whole_gradients(config: ParallelConfig, shards: int, passes: int, needed: MemoryPlan, memory: int | None) -> bool:
    """Whether gradients stay whole between the passes of a step, so that they are reduced only once."""
    if config.accumulate != "auto" or passes == 1:
        return config.accumulate == "whole" and passes > 1
    return memory is None or sharded_bytes(needed, shards, whole_gradients=True) <= _USABLE * memory


def frees_weights(
    config: ParallelConfig, shards: int, needed: MemoryPlan, memory: int | None, *, whole_gradients: bool
) -> bool:
    """Whether the gathered weights of a block are freed between its passes, and gathered again."""
    if config.reshard is not None or config.offload or memory is None:
        return config.reshard is not False
    return sharded_bytes(needed, shards, whole_gradients=whole_gradients, whole_weights=True) > _USABLE * memory


def check_pipeline(model: ModelConfig, layout: Layout) -> None:
    """Raise a `UserError` if the layout has a pipeline that the model or the other axes do not allow."""
    size, asked = layout.pipeline, f"parallel.pipeline = {layout.pipeline}"
    if size == 1:
        return
    if model.architecture.tied:
        remedy = "set --model.tied False, or leave parallel.pipeline out"
        raise UserError(f"{asked}: the head is tied to the embedding, which is in another stage: {remedy}")
    if model.value_embeddings:
        shared = f"model.value_embeddings = {model.value_embeddings} belong to the first and the last stage"
        raise UserError(f"{asked}: {shared}: set model.value_embeddings = 0, or leave parallel.pipeline out")
    for axis in ("shard", "tensor"):
        if (other := getattr(layout, axis)) > 1:
            remedy = f"--parallel.{axis} 1 --parallel.replicate {layout.world_size // size}"
            raise UserError(f"{asked} with {other} along {axis}: stages are not divided further: nearest possible: {remedy}")
    if size > model.n_layer:
        nearest = next(n for n in range(model.n_layer, 0, -1) if layout.world_size % n == 0)
        copies = f"--parallel.pipeline {nearest} --parallel.replicate {layout.world_size // nearest}"
        raise UserError(f"{asked} for model.n_layer = {model.n_layer}: nearest possible: {copies}")


def idle_fraction(stages: int, passes: int) -> float:
    """Fraction of a step in which a stage waits for others: the pipeline fills and drains (Huang et al. 2019, section 2)."""
    return (stages - 1) / (passes + stages - 1)


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage of a pipeline, as even as possible: the first ones, which have no head, get the rest."""
    sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(stages)]


def stage_of(name: str, layers: int, stages: int) -> int:
    """The stage that holds a parameter: embeddings belong to the first, the final norm and the head to the last."""
    if name.startswith("transformer.h."):
        layer = int(name.split(".")[2])
        return next(stage for stage, own in enumerate(stage_layers(layers, stages)) if layer in own)
    return stages - 1 if name.startswith(("transformer.ln_f.", "lm_head.")) else 0


def _state(needed: MemoryPlan) -> int:
    return needed.total - needed.activations.total


def _given(config: ParallelConfig, processes: int) -> Layout:
    """The layout with the sizes given; a size left open takes the remaining processes. Beside a pipeline, copies do."""
    sizes = {"replicate": config.replicate, "shard": config.shard}
    asked = {**sizes, "pipeline": config.pipeline if config.pipeline > 1 else None}
    stated = {f"parallel.{axis}": size for axis, size in asked.items() if size is not None}
    if config.replicate is None and config.shard is None:
        sizes["replicate" if config.layout == "fsdp" else "shard"] = 1
    product = math.prod(stated.values())
    open_axes = [axis for axis, size in sizes.items() if size is None]
    if processes % product == 0 and (open_axes or product == processes):
        rest = processes // product
        return Layout(**{axis: size or rest for axis, size in sizes.items()}, pipeline=config.pipeline)
    listed = " and ".join(f"{key} = {size}" for key, size in stated.items())
    need = f"a multiple of {product} processes" if open_axes else f"{product} processes"
    key, size = next(reversed(stated.items()))
    rest = product // size
    divisors = [n for n in range(1, processes + 1) if processes % n == 0 and (not rest or processes % (n * rest) == 0)]
    nearest = min(divisors or [1], key=lambda n: abs(n - size))
    others = "" if open_axes or rest * nearest == processes else f" --parallel.replicate {processes // nearest}"
    raise UserError(f"{listed}: needs {need}, but there are {processes}: nearest possible: --{key} {nearest}{others}")


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
