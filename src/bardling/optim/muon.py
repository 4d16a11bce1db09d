"""Muon for matrices and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) keeps the momentum of each matrix's gradient and updates
the matrix with its polar factor (`optim/polar.py`), whose singular values are all 1:

    momentum <- mu momentum + (1 - mu) gradient
    update   <- polar(mu momentum + (1 - mu) gradient)            (Nesterov)
    weight   <- weight (1 - lr decay) - lr sqrt(max(1, rows / columns)) update

The scale factor is Jordan's. With it the spectral norm of an update follows its shape so that features change equally at any
width (Yang, Simon and Bernstein 2023, arXiv:2310.17813): a learning rate tuned on a narrow model works for a wide one. Weight
decay is decoupled; cautious decay applies only to entries whose update points towards zero (Chen et al. 2025,
arXiv:2510.12402).

A fused matrix (queries, keys and values) is orthogonalized part by part. Parts of equal shape are stacked and processed
together. With several processes, each computes its share of every stack and all-gathers the updates in their own dtype; every
process holds all momenta, so any of them can save a checkpoint. Under FSDP2, momenta are sharded like the weights; the
gradients of a stack are gathered, and each process keeps its shard of the updates.

A device flag, `found_inf`, can skip an update, as in PyTorch's fused kernels, without a CPU-GPU sync. If it is 1, each gradient
is replaced by the momentum, which leaves the momentum unchanged bit for bit; weights do not decay and updates become zero. NaN
or infinite gradients never enter a computation.

Limits: gradients must be equal in all processes (as after DDP) or DTensors. Under FSDP2 every process temporarily holds the
gathered gradients of all matrices. A skipped update overwrites the gradients of matrices.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from bardling.optim.adamw import AdamW, avoid_compiler_import
from bardling.optim.polar import coefficients, newton_schulz

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""PyTorch 2.13 renames this collective; the old name prints a warning on every process."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `"muon": True`, `torch.optim.AdamW` for the others.

    State: `momentum` for a matrix, AdamW's `step`, `exp_avg` and `exp_avg_sq` for the rest.

    Args:
        groups: parameter groups. Muon's have `lr`, `weight_decay` and `momentum`; the others have AdamW's keys.
        splits: rows of each part of a parameter; one part if absent.
        steps: Newton-Schulz steps.
        dtype: dtype of the Newton-Schulz steps.
        cautious: decay matrices only where weight and update have the same sign.
        rank, world_size, process_group: the processes that share the work; `process_group` None for the default group.
        compiled: compile the Newton-Schulz steps.

    Raises:
        ValueError: a Muon parameter is not a matrix, or its parts do not add up to it.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        splits: Mapping[nn.Parameter, Sequence[int]] | None = None,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
        cautious: bool = False,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        rest = [group for group in groups if not group.get("muon")]
        avoid_compiler_import()
        # Shares its groups (the same dictionaries) and its state with this optimizer, see `step`.
        self._adamw = AdamW(rest) if rest else None
        super().__init__(groups, defaults={"lr": 0.0, "muon": False})
        self._splits: dict[Tensor, tuple[int, ...]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else []:
                rows = tuple((splits or {}).get(parameter, (parameter.size(0),)))
                if parameter.dim() != 2 or sum(rows) != parameter.size(0) or min(rows) < 1:
                    raise ValueError(
                        f"Muon needs matrices whose parts add up to their rows: shape {list(parameter.shape)}, parts {rows}"
                    )
                self._splits[parameter] = rows
        self._dtype, self._cautious = dtype, cautious
        self._rank, self._world_size, self._process_group = rank, world_size, process_group
        # Compute the coefficients here, so that torch.compile does not trace their computation.
        polar = functools.partial(newton_schulz, steps=coefficients(steps))
        self._polar: Callable[[Tensor], Tensor] = torch.compile(polar, dynamic=False) if compiled else polar
        # Tells GradScaler and the training step that `step` supports `found_inf` and `grad_scale`.
        self._step_supports_amp_scaling = all(group.get("fused") for group in rest)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        If AdamW's groups are fused, this supports the attributes that GradScaler sets: the update is skipped if `found_inf`, a
        scalar on the device, is 1, and gradients are divided by `grad_scale`.
        """
        flags: dict[str, Tensor | None] = {name: getattr(self, name, None) for name in ("found_inf", "grad_scale")}
        skip = None if flags["found_inf"] is None else flags["found_inf"] > 0
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["muon"]:
                    self._update_matrices(group, skip, flags["grad_scale"])
        if self._adamw is not None:
            # Loading a state replaces these dictionaries, so assign them again.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            for name, value in flags.items():
                setattr(self._adamw, name, value)
            self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any], skip: Tensor | None, grad_scale: Tensor | None) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        gradients = [_local(weight.grad) for weight in weights]
        momenta = [_local(self.state[weight]["momentum"]) for weight in weights]
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        if skip is not None:
            for gradient, momentum in zip(gradients, momenta, strict=True):
                torch.where(skip, momentum, gradient, out=gradient)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])

        stacks: dict[torch.Size, list[_Part]] = {}
        for index, (weight, gradient, momentum) in enumerate(zip(weights, gradients, momenta, strict=True)):
            for part in self._parts(index, weight, gradient, momentum, group["momentum"]):
                stacks.setdefault(part.gradient.shape, []).append(part)
        # Start all stacks before waiting for the first.
        started = [(shape, parts, self._start_polar(parts, group["momentum"])) for shape, parts in stacks.items()]
        sharded_updates: dict[int, dict[int, Tensor]] = {}
        for shape, parts, wait in started:
            stack = wait()
            if skip is not None:
                stack.masked_fill_(skip, 0.0)
            scale, updates = max(1.0, shape[0] / shape[1]) ** 0.5, stack.unbind()
            views = [part.weight for part in parts if part.weight is not None]
            if views:
                self._apply(views, updates, group, scale, skip)
            else:
                for part, update in zip(parts, updates, strict=True):
                    sharded_updates.setdefault(part.weight_index, {})[part.part_index] = update * scale
        for index, by_part in sharded_updates.items():
            full_update = torch.cat([by_part[part_index] for part_index in sorted(by_part)])
            self._apply([_local(weights[index])], [_shard_like(full_update, weights[index])], group, 1.0, skip)

    def _parts(self, index: int, weight: Tensor, gradient: Tensor, momentum: Tensor, mu: float) -> list["_Part"]:
        """The parts of a weight; `gradient` and `momentum` are local."""
        rows = list(self._splits[weight])
        if _is_sharded(weight):
            gradient = _full(torch.lerp(gradient, momentum, mu), weight)
            return [_Part(index, part_index, part) for part_index, part in enumerate(torch.split(gradient, rows))]
        split = (torch.split(tensor, rows) for tensor in (gradient, momentum, weight))
        return [_Part(index, part_index, *views) for part_index, views in enumerate(zip(*split, strict=True))]

    def _start_polar(self, parts: Sequence["_Part"], mu: float) -> Callable[[], Tensor]:
        """Start to compute the polar factors of k parts [m, n]; the result is a function that returns them as [k, m, n]."""
        per_process = -(-len(parts) // self._world_size)  # the last processes may have fewer
        shape, device = parts[0].gradient.shape, parts[0].gradient.device
        stack = torch.zeros((per_process, *shape), dtype=self._dtype, device=device)
        own = parts[self._rank * per_process : (self._rank + 1) * per_process]
        updates = [part.gradient for part in own]
        momenta = [part.momentum for part in own if part.momentum is not None]
        if momenta:
            updates = list(torch._foreach_lerp(updates, momenta, mu))
        if own:  # the last processes may have none
            torch._foreach_copy_(list(stack[: len(own)].unbind()), updates)
        factors = self._polar(stack)
        if self._world_size == 1:
            return lambda: factors
        gathered = factors.new_empty((per_process * self._world_size, *shape))
        work = _all_gather(gathered, factors, group=self._process_group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return gathered[: len(parts)]

        return wait

    def _apply(
        self, weights: Sequence[Tensor], updates: Sequence[Tensor], group: dict[str, Any], scale: float, skip: Tensor | None
    ) -> None:
        """Decay and update `weights`; if `skip` is true, `updates` are zero and the decay is skipped."""
        decay = group["lr"] * group["weight_decay"]
        if decay and self._cautious:
            for weight, update in zip(weights, updates, strict=True):
                decays = weight * update >= 0
                weight.sub_(weight * (decays if skip is None else decays.logical_and_(~skip)), alpha=decay)
        elif decay and skip is None:
            torch._foreach_mul_(list(weights), 1 - decay)
        elif decay and skip is not None:
            # Filled on the device: copying a number from host memory would be a CPU-GPU sync point.
            dtype = torch.promote_types(weights[0].dtype, torch.float32)
            factor = torch.full((), 1 - decay, dtype=dtype, device=skip.device).masked_fill_(skip, 1.0)
            torch._foreach_mul_(list(weights), factor)
        torch._foreach_add_(list(weights), list(updates), alpha=-group["lr"] * scale)


@dataclass(frozen=True)
class _Part:
    """A matrix to orthogonalize: rows of a weight that belong together."""

    weight_index: int  # in the parameter group
    part_index: int  # in the weight
    gradient: Tensor  # [m, n]
    momentum: Tensor | None = None  # [m, n]; None if `gradient` already includes it
    weight: Tensor | None = None  # [m, n] view of the weight; None under FSDP2, which updates whole weights


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Importing that class takes a third of a second; without the import there are no
    DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Tensor | None) -> Tensor:
    """This process's shard of a tensor."""
    assert tensor is not None
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _full(local: Tensor, like: "DTensor") -> Tensor:
    """The full tensor of which this process holds the shard `local`, with the layout of `like`."""
    sharded = type(like).from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


def _shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `full`, which every process holds, with the layout of `like`; needs no communication."""
    if not _is_sharded(like):
        return full
    from torch.distributed.tensor import Replicate

    replicated = type(like).from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()
