"""Muon for matrices and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) keeps a running mean of each matrix's gradient and moves
the matrix by the mean's polar factor (`optim/polar.py`), an update whose singular values are all 1:

    mean   <- momentum mean + (1 - momentum) gradient
    update <- polar(momentum mean + (1 - momentum) gradient)            (Nesterov's form)
    weight <- weight (1 - lr decay) - lr sqrt(max(1, rows / columns)) update

The factor is Jordan's. With it the spectral norm of an update follows its shape so that features change as much at any width
(Yang, Simon and Bernstein 2023, arXiv:2310.17813): a learning rate found on a narrow model serves a wide one.
Decay is decoupled; the cautious kind decays only entries whose update points towards zero (Chen et al. 2025, arXiv:2510.12402).

A matrix that is several on top of each other (queries, keys and values) is orthogonalised part by part. Parts of equal shape
are stacked and computed together. With several processes, each computes its share of every stack and all gather the updates
in the format in which they were computed; momenta are whole in every process, so that any of them can save them. Under FSDP2
momenta are sharded as the weights are; a stack's gradients are gathered, and each process keeps its rows of the updates.

An update can be left out by a flag on the device, `found_inf`, as with PyTorch's fused kernels: nobody waits for its value.
Where it is 1, each gradient is taken to be the mean itself, which leaves the mean as it is to the bit, weights keep their whole
size and updates become zeros. What was NaN or infinite in a gradient is never computed with.

Limits: gradients must be alike in all processes (as DDP leaves them) or DTensors. Under FSDP2 every process holds the
gathered gradients of all matrices for a moment. Where an update is left out, matrices' gradients are overwritten.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from bardling.optim.adamw import AdamW, spare_compiler
from bardling.optim.polar import coefficients, newton_schulz


class Muon(torch.optim.Optimizer):
    """Muon over the groups with `"muon": True`, `torch.optim.AdamW` over the others.

    State: `momentum` for a matrix, AdamW's `step`, `exp_avg` and `exp_avg_sq` for the rest.

    Args:
        groups: as for any optimizer. Muon's have `lr`, `weight_decay`, `momentum`; the others take AdamW's keys.
        splits: by parameter, the rows of each of its parts; absent: one part.
        dtype: of the Newton-Schulz steps.
        cautious: decay matrices only where weight and update have the same sign.
        rank, world_size: this process among those that share the work; `process_group` None is the default group.
        compiled: compile the Newton-Schulz steps.

    Raises:
        ValueError: a matrix that is none, or parts that do not fill it.
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
        spare_compiler()
        # It shares its groups (the dictionaries themselves) and its state with this optimizer: see `step`.
        self._adamw = AdamW(rest) if rest else None
        super().__init__(groups, defaults={"lr": 0.0, "muon": False})
        self._splits: dict[nn.Parameter, tuple[int, ...]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else []:
                rows = tuple((splits or {}).get(parameter, (parameter.size(0),)))
                if parameter.dim() != 2 or sum(rows) != parameter.size(0) or min(rows) < 1:
                    raise ValueError(f"Muon wants matrices in parts that fill them: {list(parameter.shape)}, parts {rows}")
                self._splits[parameter] = rows
        self._dtype, self._cautious = dtype, cautious
        self._rank, self._world_size, self._process_group = rank, world_size, process_group
        # The coefficients are computed here: a compiler would trace their computation.
        polar = functools.partial(newton_schulz, steps=coefficients(steps))
        self._polar: Callable[[Tensor], Tensor] = torch.compile(polar, dynamic=False) if compiled else polar
        # Tells GradScaler, and whoever else decides on the device, that `step` heeds `found_inf` and `grad_scale`.
        self._step_supports_amp_scaling = all(group.get("fused") for group in rest)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        The attributes that GradScaler sets are heeded, where AdamW's groups are fused: `found_inf`, a scalar on the device,
        leaves the update out where it is 1; gradients are divided by `grad_scale`.
        """
        flags: dict[str, Tensor | None] = {name: getattr(self, name, None) for name in ("found_inf", "grad_scale")}
        bad = None if flags["found_inf"] is None else flags["found_inf"] > 0
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["muon"]:
                    self._update_matrices(group, bad, flags["grad_scale"])
        if self._adamw is not None:
            # Loading a state replaces the dictionaries, so they are handed over anew.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            for name, value in flags.items():
                setattr(self._adamw, name, value)
            self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any], bad: Tensor | None, grad_scale: Tensor | None) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        gradients = [_local(weight.grad) for weight in weights]
        means = [_local(self.state[weight]["momentum"]) for weight in weights]
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        if bad is not None:
            for gradient, mean in zip(gradients, means, strict=True):
                torch.where(bad, mean, gradient, out=gradient)
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])

        stacks: dict[torch.Size, list[_Part]] = {}
        for number, (weight, gradient, mean) in enumerate(zip(weights, gradients, means, strict=True)):
            rows = list(self._splits[weight])
            if _is_sharded(weight):
                gradient = _whole(torch.lerp(gradient, mean, group["momentum"]), weight)
                parts = [_Part(number, place, part) for place, part in enumerate(torch.split(gradient, rows))]
            else:
                split = (torch.split(tensor, rows) for tensor in (gradient, mean, weight))
                parts = [_Part(number, place, *views) for place, views in enumerate(zip(*split, strict=True))]
            for part in parts:
                stacks.setdefault(part.gradient.shape, []).append(part)
        # Every stack is sent off before the first is waited for.
        waiting = [(shape, parts, self._compute(parts, group["momentum"])) for shape, parts in stacks.items()]
        sharded: dict[int, dict[int, Tensor]] = {}
        for shape, parts, finish in waiting:
            stack = finish()
            if bad is not None:
                stack.masked_fill_(bad, 0.0)
            scale, factors = max(1.0, shape[0] / shape[1]) ** 0.5, stack.unbind()
            own = [part.weight for part in parts if part.weight is not None]
            if own:
                self._move(own, factors, group, scale, bad)
            else:
                for part, factor in zip(parts, factors, strict=True):
                    sharded.setdefault(part.number, {})[part.place] = factor * scale
        for number, pieces in sharded.items():
            weight = weights[number]
            update = torch.cat([pieces[place] for place in sorted(pieces)])
            self._move([_local(weight)], [_share(update, weight)], group, 1.0, bad)

    def _compute(self, parts: Sequence["_Part"], momentum: float) -> Callable[[], Tensor]:
        """Start on the polar factors of k matrices [m, n]; the result waits for them and returns [k, m, n]."""
        each = -(-len(parts) // self._world_size)  # the last processes may have less to do
        shape, device = parts[0].gradient.shape, parts[0].gradient.device
        stack = torch.zeros((each, *shape), dtype=self._dtype, device=device)
        own = parts[self._rank * each : (self._rank + 1) * each]
        updates = [part.gradient for part in own]
        means = [part.mean for part in own if part.mean is not None]
        if means:
            updates = list(torch._foreach_lerp(updates, means, momentum))
        if own:  # of a short stack the last processes have nothing
            torch._foreach_copy_(list(stack[: len(own)].unbind()), updates)
        factors = self._polar(stack)
        if self._world_size == 1:
            return lambda: factors
        gathered = factors.new_empty((each * self._world_size, *shape))
        work = dist.all_gather_into_tensor(gathered, factors, group=self._process_group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return gathered[: len(parts)]

        return finish

    def _move(
        self, weights: Sequence[Tensor], factors: Sequence[Tensor], group: dict[str, Any], scale: float, bad: Tensor | None
    ) -> None:
        """Decay `weights` and move them by their updates, which are zeros where `bad` is true."""
        decay = group["lr"] * group["weight_decay"]
        if decay and self._cautious:
            for weight, factor in zip(weights, factors, strict=True):
                decays = weight * factor >= 0
                weight.sub_(weight * (decays if bad is None else decays.logical_and_(~bad)), alpha=decay)
        elif decay and bad is None:
            torch._foreach_mul_(list(weights), 1 - decay)
        elif decay and bad is not None:
            # Filled on the device: a number that is made in host memory and copied would make the host wait.
            wide = torch.promote_types(weights[0].dtype, torch.float32)
            kept = torch.full((), 1 - decay, dtype=wide, device=bad.device).masked_fill_(bad, 1.0)
            torch._foreach_mul_(list(weights), kept)
        torch._foreach_add_(list(weights), list(factors), alpha=-group["lr"] * scale)


@dataclass(frozen=True)
class _Part:
    """A matrix to orthogonalise: rows of a weight that belong together."""

    number: int  # of its weight, within the group
    place: int  # among the parts of its weight
    gradient: Tensor  # [m, n]
    mean: Tensor | None = None  # [m, n]; None where `gradient` is already the one to follow
    weight: Tensor | None = None  # [m, n] view of the weight; None under FSDP2, which moves whole weights


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Importing that class takes a third of a second; where nobody did, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Tensor | None) -> Tensor:
    """What this process holds of a tensor."""
    assert tensor is not None
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which this process holds `local`, laid out as `like`."""
    if not _is_sharded(like):
        return local
    sharded = type(like).from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of `whole`, which every process has, laid out as `like`; nothing is sent."""
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import Replicate

    everywhere = type(like).from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
