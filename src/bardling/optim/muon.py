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

Limits: gradients must be alike in all processes (as DDP leaves them) or DTensors. Under FSDP2 every process holds the
gathered gradients of all matrices for a moment.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from bardling.optim.polar import orthogonalize


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
        # It shares its groups (the dictionaries themselves) and its state with this optimizer: see `step`.
        self._adamw = torch.optim.AdamW(rest) if rest else None
        super().__init__(groups, defaults={"lr": 0.0, "muon": False})
        self._splits: dict[nn.Parameter, tuple[int, ...]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else []:
                rows = tuple((splits or {}).get(parameter, (parameter.size(0),)))
                if parameter.dim() != 2 or sum(rows) != parameter.size(0) or min(rows) < 1:
                    raise ValueError(f"Muon wants matrices in parts that fill them: {list(parameter.shape)}, parts {rows}")
                self._splits[parameter] = rows
        self._steps, self._dtype, self._cautious = steps, dtype, cautious
        self._rank, self._world_size, self._process_group = rank, world_size, process_group
        self._polar: Callable[[Tensor, int], Tensor] = (
            torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["muon"]:
                    self._update_matrices(group)
        if self._adamw is not None:
            # Loading a state replaces the dictionaries, so they are handed over anew.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not weights:
            return
        gradients = [_local(weight.grad) for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        means = [_local(self.state[weight]["momentum"]) for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        updates = self._orthogonal([_whole(tensor, weight) for tensor, weight in zip(ahead, weights, strict=True)], weights)

        own = [_local(weight) for weight in weights]
        shares = [_share(update, weight) for update, weight in zip(updates, weights, strict=True)]
        decay = group["lr"] * group["weight_decay"]
        if decay and self._cautious:
            for weight, update in zip(own, shares, strict=True):
                weight.sub_(weight * (weight * update >= 0), alpha=decay)
        elif decay:
            torch._foreach_mul_(own, 1 - decay)
        torch._foreach_add_(own, shares, alpha=-group["lr"])

    def _orthogonal(self, tensors: Sequence[Tensor], weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """The scaled polar factor of each tensor, part by part; stacks of equal shape are computed together."""
        stacks: dict[tuple[int, int], list[Tensor]] = {}
        for tensor, weight in zip(tensors, weights, strict=True):
            for part in torch.split(tensor, list(self._splits[weight])):
                wide = part if part.size(0) <= part.size(1) else part.mT  # [m, n] with m <= n
                stacks.setdefault((wide.size(0), wide.size(1)), []).append(wide)
        # Every stack is sent off before the first is waited for.
        waiting = [(shape, self._compute(parts)) for shape, parts in stacks.items()]
        done = {shape: iter(finish().to(tensors[0].dtype).unbind()) for shape, finish in waiting}
        results = []
        for tensor, weight in zip(tensors, weights, strict=True):
            result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for part in torch.split(result, list(self._splits[weight])):
                rows, columns = part.shape
                wide = next(done[min(rows, columns), max(rows, columns)])
                torch.mul(wide if rows <= columns else wide.mT, max(1.0, rows / columns) ** 0.5, out=part)
            results.append(result)
        return results

    def _compute(self, parts: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Start on the polar factors of equally shaped matrices; the result waits for them and returns [k, m, n]."""
        each = -(-len(parts) // self._world_size)  # the last processes may have less to do
        mine = parts[self._rank * each : (self._rank + 1) * each]
        stack = torch.zeros((each, *parts[0].shape), dtype=self._dtype, device=parts[0].device)
        for place, part in zip(stack, mine, strict=False):
            place.copy_(part)
        factors = self._polar(stack, self._steps)
        if self._world_size == 1:
            return lambda: factors
        gathered = factors.new_empty((each * self._world_size, *factors.shape[1:]))
        work = dist.all_gather_into_tensor(gathered, factors, group=self._process_group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return gathered[: len(parts)]

        return finish


def _local(tensor: Tensor | None) -> Tensor:
    """What this process holds of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which this process holds `local`, laid out as `like`."""
    if not isinstance(like, DTensor):
        return local
    sharded = DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of `whole`, which every process has, laid out as `like`; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
