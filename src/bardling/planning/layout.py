"""Layout of a run's processes: the sizes of the device mesh axes, given or chosen by memory."""

import math
from dataclasses import astuple, dataclass, replace

from bardling.config import ModelConfig, ParallelConfig
from bardling.errors import UserError
from bardling.planning.memory import MemoryPlan

AXES = ("replicate", "shard", "tensor", "pipeline", "context")
"""Mesh axes, outermost first: neighbouring ranks, which have the fastest links, differ along the innermost axes."""

DATA_AXES = ("replicate", "shard")
"""Axes along which processes train on different samples."""

_USABLE = 0.9  # of a device's memory; the rest goes to fragmentation and libraries


@dataclass(frozen=True)
class Layout:
    """Processes along each axis of the mesh; an unused axis has size 1."""

    replicate: int = 1  # each holds all parameters (DDP)
    shard: int = 1  # each holds a shard of every parameter (FSDP2)
    tensor: int = 1  # each computes a fraction of every layer
    pipeline: int = 1  # each computes some of the layers
    context: int = 1  # each computes some tokens of every sequence, and holds a shard of every parameter

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
        return self.world_size > self.replicate

    def __str__(self) -> str:
        kinds = {(False, False): "", (True, False): "DDP", (False, True): "FSDP2", (True, True): "HSDP"}
        name = kinds[self.replicate > 1, self.shard * self.context > 1]
        if self.pipeline > 1:
            name = f"{name} of pipelines" if name else "pipeline"
        if self.tensor > 1:
            name = f"{name} with tensor parallelism" if name else "tensor parallelism"
        if self.context > 1:
            name = f"{name} with context parallelism"
        name = name or "one process"
        used = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)
        return f"{name} ({used})" if used else name


def choose_layout(
    config: ParallelConfig,
    processes: int,
    per_node: int,
    needed: MemoryPlan,
    memory: int | None,
    model: ModelConfig | None = None,
) -> tuple[Layout, str]:
    """The layout of all processes, and why.

    Args:
        per_node: processes on each machine.
        needed: memory of one process that holds the whole model.
        memory: that of a process's device (bytes); None if unknown.
        model: None if its layers cannot be divided (no tensor parallelism).

    Raises:
        UserError: the sizes given do not fit the number of processes or the model.
    """
    if config.tensor is not None and model is not None:
        check_tensor(model, config.tensor)
    tensor = config.tensor or 1
    given = config.replicate, config.shard, *(size if size > 1 else None for size in (config.pipeline, config.context))
    if any(size is not None for size in given) or processes % tensor:
        return given_layout(config, processes, model), "as configured"
    rest = processes // tensor
    if config.layout != "auto" or rest == 1:
        whole = config.layout != "fsdp"
        return replace(Layout(replicate=rest) if whole else Layout(shard=rest), tensor=tensor), "as configured"
    if memory is None:
        return Layout(replicate=rest, tensor=tensor), "the memory of the device is unknown"
    limit, divided = _USABLE * memory, ""
    if config.tensor is None and model is not None and sharded_bytes(needed, Layout(shard=processes)) > limit:
        tensor, divided = _fitting_tensor(model, processes, per_node, needed, limit)
    rest, activations = processes // tensor, needed.activations.total
    sizes = f"{_gb(_state(needed))} of weights, gradients and optimizer state and {_gb(activations)} of activations"
    if sharded_bytes(needed, Layout(tensor=tensor)) <= limit:
        return Layout(replicate=rest, tensor=tensor), f"{sizes}{divided or _among(tensor)} fit in {_gb(memory)}"
    nodes = processes // per_node if processes % per_node == 0 and per_node % tensor == 0 else 1
    within = Layout(replicate=nodes, shard=rest // nodes, tensor=tensor)
    fits = sharded_bytes(needed, within) <= limit
    chosen = within if nodes > 1 and fits else Layout(shard=rest, tensor=tensor)
    share = f"{_gb(sharded_bytes(needed, chosen))} on each of {chosen.shard * tensor} processes"
    return chosen, f"{sizes} do not fit in {_gb(memory)}, sharded{divided or _among(tensor)} {share}"


def given_layout(config: ParallelConfig, processes: int, model: ModelConfig | None = None) -> Layout:
    """The layout with the sizes given; a size left open takes the remaining processes. Beside a pipeline, copies do.

    A message for sizes that do not fit suggests one that can divide the `model`.
    """
    sizes = {"replicate": config.replicate, "shard": config.shard, "tensor": config.tensor}
    asked = {**sizes, **{axis: size for axis in ("pipeline", "context") if (size := getattr(config, axis)) > 1}}
    stated = {f"parallel.{axis}": size for axis, size in asked.items() if size is not None}
    if config.replicate is None and config.shard is None:
        sizes["replicate" if config.layout == "fsdp" else "shard"] = 1
    product = math.prod(stated.values())
    open_axes = [axis for axis in ("replicate", "shard") if sizes[axis] is None]
    if processes % product == 0 and (open_axes or product == processes):
        rest = dict.fromkeys(open_axes, processes // product)
        found = {axis: size or rest.get(axis, 1) for axis, size in sizes.items()}
        return Layout(**found, pipeline=config.pipeline, context=config.context)
    listed = " and ".join(f"{key} = {size}" for key, size in stated.items())
    need = f"a multiple of {product} processes" if open_axes else f"{product} processes"
    key, size = next(reversed(stated.items()))
    others_size = product // size
    divided = {"parallel.tensor": _divided_sizes, "parallel.context": _heads}.get(key)
    counts = [processes // others_size, *(divided(model).values() if divided and model else ())]
    divisors = [n for n in range(1, processes + 1) if not any(count % n for count in counts)]
    nearest = min(divisors if processes % others_size == 0 else [1], key=lambda n: abs(n - size))
    others = "" if open_axes or others_size * nearest == processes else f" --parallel.replicate {processes // nearest}"
    raise UserError(f"{listed}: needs {need}, but there are {processes}: nearest possible: --{key} {nearest}{others}")


def check_tensor(model: ModelConfig, size: int) -> None:
    """Check that tensor parallelism can divide a model among `size` processes.

    Raises:
        UserError: it cannot; the message names the nearest size that can.
    """
    sizes = _divided_sizes(model)
    key = next((key for key, value in sizes.items() if value % size), None)
    if key is not None:
        possible = [n for n in range(1, size + max(sizes.values())) if not any(value % n for value in sizes.values())]
        nearest = min(possible, key=lambda n: abs(n - size))
        raise UserError(
            f"parallel.tensor = {size} does not divide {key} = {sizes[key]}: nearest possible: --parallel.tensor {nearest}"
        )


def check_context(model: ModelConfig, layout: Layout) -> None:
    """Raise a `UserError` if the layout has context parallelism that the model or the other axes do not allow."""
    size, asked = layout.context, f"parallel.context = {layout.context}"
    if size == 1:
        return
    if layout.tensor > 1:
        remedy = f"nearest possible: --parallel.tensor 1 --parallel.shard {layout.shard * layout.tensor}"
        raise UserError(f"{asked} with parallel.tensor = {layout.tensor}: either divides the heads: {remedy}")
    if model.value_embeddings:
        remedy = "set model.value_embeddings = 0, or leave parallel.context out"
        raise UserError(f"{asked}: value embeddings are not divided among processes: {remedy}")
    heads = _heads(model)
    key = next((key for key, count in heads.items() if count % size), None)
    if key is not None:
        common = math.gcd(layout.world_size, *heads.values())
        nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - size))
        raise UserError(f"{asked} does not divide {key} = {heads[key]}: nearest possible: --parallel.context {nearest}")


def sharded_bytes(needed: MemoryPlan, layout: Layout, *, whole_gradients: bool = False, whole_weights: bool = False) -> int:
    """Memory of one process in a layout; the activations include what is gathered for a pass. Tensor parallelism divides
    activations, too."""
    shards = layout.shard * layout.context
    whole = (needed.gradients * whole_gradients + needed.weights * whole_weights) * (1 - 1 / shards)
    activations = needed.activations.total / layout.context
    return int((_state(needed) / shards / layout.pipeline + whole + activations) / layout.tensor)


def keeps_whole_gradients(config: ParallelConfig, layout: Layout, passes: int, needed: MemoryPlan, memory: int | None) -> bool:
    """Whether gradients stay whole between the passes of a step, so that they are reduced only once."""
    if config.accumulate != "auto" or passes == 1:
        return config.accumulate == "whole" and passes > 1
    return memory is None or sharded_bytes(needed, layout, whole_gradients=True) <= _USABLE * memory


def frees_weights(
    config: ParallelConfig, layout: Layout, needed: MemoryPlan, memory: int | None, *, whole_gradients: bool
) -> bool:
    """Whether the gathered weights of a block are freed between its passes, and gathered again."""
    if config.reshard is not None or config.offload or memory is None:
        return config.reshard is not False
    return sharded_bytes(needed, layout, whole_gradients=whole_gradients, whole_weights=True) > _USABLE * memory


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
    for axis in ("shard", "tensor", "context"):
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


def _heads(model: ModelConfig) -> dict[str, int]:
    """What the processes of a context group must divide evenly."""
    return {"model.n_head": model.architecture.n_head, "model.n_kv_head": model.architecture.n_kv_head}


def _divided_sizes(model: ModelConfig) -> dict[str, int]:
    """What the processes of a tensor group must divide evenly."""
    sizes = _heads(model) | {"model.mlp_hidden": model.architecture.mlp_hidden}
    vocabulary = {"model.vocab_size, padded to model.vocab_multiple,": model.padded_vocab_size} if model.vocab_size else {}
    return sizes | vocabulary


def _fitting_tensor(model: ModelConfig, processes: int, per_node: int, needed: MemoryPlan, limit: float) -> tuple[int, str]:
    """The smallest size of tensor parallelism, within a machine, with which the sharded model fits; 1 if there is none."""
    values = [*_divided_sizes(model).values(), processes, per_node]
    for size in range(2, per_node + 1):
        layout = Layout(shard=processes // size, tensor=size)
        if not any(value % size for value in values) and sharded_bytes(needed, layout) <= limit:
            alone = _gb(sharded_bytes(needed, Layout(shard=processes)))
            return size, f" ({alone} on each process even then), with layers divided among {size}"
    return 1, ""


def _among(tensor: int) -> str:
    return f", with layers divided among {tensor}," if tensor > 1 else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
