"""FSDP2: each process holds a shard of every parameter, its gradient and its optimizer state.

PyTorch's `fully_shard` gathers the weights of a block just before its passes and reduces its gradients just after (Zhao et al.
2023, arXiv:2304.11277; Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054). A shard is a range of rows of the whole parameter:
rank r of n has rows [r c, (r + 1) c), with c = ceil(rows / n), so the last ranks may have fewer or none. With copies of the
shards (HSDP), gradients are also summed over the copies.

Outside the passes everything works on `Shards.parameters`, plain tensors that share memory with PyTorch's shards: the
optimizer, the EMA, clipping and checkpoints need not know about sharding, except where whole parameters are needed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.distributed.context import Context
from bardling.distributed.context_parallel import divide_tokens
from bardling.distributed.device import DTYPES
from bardling.distributed.overlap import Reductions
from bardling.distributed.tensor import divide
from bardling.model.divided import Split, tensor_splits
from bardling.model.gpt import GPT
from bardling.model.init import initial_value

SHARD_AXES = ("shard", "tensor", "context")
"""Axes of the mesh along which processes hold different parts of a parameter."""

MODEL_AXES = ("shard", "tensor", "pipeline", "context")
"""Axes of the mesh along which processes hold different parts of the model."""


class SharedScaler(torch.amp.GradScaler):
    """Skips an update in all processes if the gradients of any overflow. (PyTorch's own for shards fails on a CPU.)"""

    def __init__(self, device: str, group: dist.ProcessGroup | None) -> None:
        super().__init__(device)
        self._group = group

    def _unscale_grads_(self, *args: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*args)
        for overflowed in found.values():
            dist.all_reduce(overflowed, group=self._group)
        return found


class Shards:
    """The part of a sharded model that this process holds."""

    _splits: Mapping[str, Split] = {}  # what tensor parallelism divides
    _tensor = 1  # among how many processes
    reductions: Reductions | None = None  # that may not be complete

    def __init__(self, model: GPT, context: Context) -> None:
        self._sharded: dict[str, Any] = dict(model.named_parameters())  # DTensors
        self._tensor = context.size("tensor")
        if self._tensor > 1:
            self._splits = tensor_splits(model.config)
        self._tensor_group = context.group(("tensor",))
        self.group = context.group(SHARD_AXES)
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.copy = 0 if context.mesh is None else context.mesh.get_local_rank("replicate")  # which copy of the shards
        self.shapes = {name: self._whole_shape(name) for name in self._sharded}
        self.parameters = {name: nn.Parameter(_local(p), requires_grad=p.requires_grad) for name, p in self._sharded.items()}
        self.owners = _balanced(self.shapes, self.count)

    def counts(self, name: str) -> bool:
        """Whether sums over shards include this process's part of a parameter: of equal parts, that of one process only."""
        return name in self._splits or self.rank % self._tensor == 0

    def rows(self, name: str, rank: int) -> tuple[int, int]:
        """The rows that a rank holds: from, to; with tensor parallelism, those of its fraction of the parameter."""
        total, shards = self._sharded[name].shape[0], self.count // self._tensor
        size, number = -(-total // shards), rank // self._tensor
        return min(number * size, total), min((number + 1) * size, total)

    def region(self, name: str, rank: int, first: int, last: int) -> tuple[slice, slice, slice]:
        """What a rank holds of the matrix of rows `first` to before `last`, one of the parts of a parameter: the matrix's rows
        and columns, and which of the rank's rows these are."""
        split, number = self._splits.get(name), rank % self._tensor
        begin, end = self.rows(name, rank)
        offset, columns = 0, slice(None)
        if split is not None and split.dim == 0:
            height = (last - first) // self._tensor
            first, offset = first // self._tensor, number * height
            last = first + height
        elif split is not None:
            width = self._sharded[name].shape[1]
            columns = slice(number * width, (number + 1) * width)
        low = min(max(begin, first), last)
        high = max(low, min(end, last))
        return slice(low - first + offset, high - first + offset), columns, slice(low - begin, high - begin)

    def take(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of `whole`, a tensor with the shape of a parameter; others, such as parts, stay as they are."""
        if tuple(whole.shape) != self.shapes[name]:
            return whole
        first, last = self.rows(name, self.rank)
        split = self._splits.get(name)
        return (whole if split is None else split.fraction(whole, self.rank % self._tensor, self._tensor))[first:last]

    def parameter_of(self, key: str) -> str:
        """The parameter that a tensor belongs to: named by it, possibly with a prefix and an entry such as `.exp_avg`."""
        name = key.rpartition(":")[2]
        return name if name in self.shapes else name.rpartition(".")[0]

    def holds(self, key: str) -> bool:
        """Whether this process has a part of a tensor, named as for `parameter_of`; also if no process has."""
        return True

    def merged(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's metadata in all processes together. Collective over the shards."""
        return dict(facts)

    def owned(self, local: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Gather tensors one by one; those that this process writes, whole and in host memory. Collective over the shards.

        Args:
            local: what this process holds of tensors, named as for `parameter_of`; numbers are the same in all processes.
        """
        names = {key: self.parameter_of(key) for key in local}
        kinds = sorted({key.replace(name, "") for key, name in names.items()} | {""})
        for key, tensor in local.items():
            name = names[key]
            whole = self.gather(name, tensor) if tensor.dim() else tensor
            if self.writer(name, kinds.index(key.replace(name, ""))) == self.rank:
                yield key, whole.detach().to("cpu", copy=True)

    def writer(self, name: str, kind: int) -> int:
        """Who writes the tensor of a kind that belongs to a parameter: 0 is its value, and others follow its owner in turn."""
        return (self.owners[name] + kind) % self.count

    @torch.no_grad()
    def gather(self, name: str, local: Tensor) -> Tensor:
        """The whole of which every process holds the part `local`, in all processes. Collective over the shards."""
        shape, split = self._sharded[name].shape, self._splits.get(name)
        size = -(-shape[0] // (self.count // self._tensor))
        padded = local.new_zeros(size, *shape[1:])
        padded[: len(local)] = local
        parts = local.new_empty(size * self.count, *shape[1:])
        all_gather(parts, padded, self.group)
        parts = parts.view(-1, self._tensor, size, *shape[1:])
        if split is None:
            return parts[:, 0].flatten(0, 1)[: shape[0]]
        return split.join([part.flatten(0, 1)[: shape[0]] for part in parts.unbind(1)])

    @torch.no_grad()
    def load(self, whole: Callable[[str], Tensor]) -> None:
        """Set all parameters; `whole(name)` is called for one at a time."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.take(name, whole(name)))

    def collect_gradients(self) -> None:
        """Make the gradients of `parameters` those of the passes. The first pass may have moved the shards."""
        if self.reductions is not None:
            self.reductions.finish()
        for name, parameter in self.parameters.items():
            sharded = self._sharded[name]
            parameter.data = _local(sharded)
            parameter.grad = None if sharded.grad is None else _local(sharded.grad)
        if self._tensor > 1:  # each process has seen some of the tokens or heads
            partial = [p.grad for name, p in self.parameters.items() if p.grad is not None and name not in self._splits]
            flat = torch.cat([gradient.flatten() for gradient in partial])
            dist.all_reduce(flat, group=self._tensor_group)
            for gradient, total in zip(partial, torch.split(flat, [g.numel() for g in partial]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def gradient_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return SharedScaler(device.type, self.group)

    def zero_gradients(self) -> None:
        if self.reductions is not None:
            self.reductions.finish()
        for sharded, parameter in zip(self._sharded.values(), self.parameters.values(), strict=True):
            sharded.grad = parameter.grad = None

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        shape, split = list(self._sharded[name].shape), self._splits.get(name)
        if split is not None:
            shape[split.dim] = sum(split.parts)
        return tuple(shape)


def shard(
    build: Callable[[], GPT],
    context: Context,
    *,
    precision: str,
    compiled: bool,
    reshard: bool,
    offload: bool,
) -> tuple[GPT, Shards]:
    """The model that `build` builds on the meta device, sharded, with undefined values. Collective.

    Args:
        precision: in which blocks are gathered and computed; reductions and shards are float32.
        compiled: compile each block, all with the same code.
        reshard, offload: as in `ParallelConfig`.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    with torch.device("meta"):
        model = build()
    assert context.mesh is not None
    if context.size("tensor") > 1:
        divide(model, context, tensor_splits(model.config))
    if context.size("context") > 1:
        divide_tokens(model, context)
    mesh, copies = _mesh(context), context.size("replicate") > 1
    options: dict[str, Any] = {"mesh": mesh}
    options["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
    # The residual stream stays float32, so inputs are not cast; embeddings, norm and head are computed as without sharding.
    low = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False) if precision == "float32" else low
    for block in model.transformer.h:
        if compiled:
            block.forward = torch.compile(block.forward, dynamic=False)
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, **options)
        if not reshard:
            block.register_forward_pre_hook(_keep_for_backward)
    # The root is always resharded: evaluation must not leave weights behind that the next update makes stale.
    fully_shard(model, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    model.to_empty(device="cpu" if offload else context.device)
    shards = Shards(model, context)
    if context.device.type == "cpu" and not copies:
        shards.reductions = Reductions([model, *model.transformer.h])
    return model, shards


def _mesh(context: Context) -> Any:
    """The processes that share shards, and the copies of these, if there are any."""
    assert context.mesh is not None
    shards = "shard" if context.size("context") == 1 else "context"
    if context.size("shard") > 1 and shards == "context":
        shards = "shard_context"
        context.mesh["shard", "context"]._flatten(shards)
    return context.mesh["replicate", shards] if context.size("replicate") > 1 else context.mesh[shards]


def _keep_for_backward(block: Any, _: object) -> None:
    """Keep gathered weights only if a backward pass will free them. Those of an evaluation would soon be stale."""
    block.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False)


def initialize(shards: Shards, config: ModelConfig, seed: int) -> None:
    """Give sharded parameters the initial weights of an unsharded model; only one whole parameter exists at a time."""
    shards.load(lambda name: initial_value(name, torch.Size(shards.shapes[name]), config, seed))


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather equal parts into `whole`, in the order of the ranks."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part, group=group)


def _local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, which shares its memory."""
    local: Tensor = tensor.detach().to_local()
    return local


def _balanced(shapes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, int]:
    """A rank for each parameter, so that all get about the same number of elements."""
    loads, owners = [0] * count, {}
    for name in sorted(shapes, key=lambda name: (-torch.Size(shapes[name]).numel(), name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += torch.Size(shapes[name]).numel()
    return owners
