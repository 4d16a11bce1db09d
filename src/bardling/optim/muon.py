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
process holds all momenta, so any of them can save a checkpoint. Of a sharded model, a process holds rows of every matrix and of
its momentum. Each process then receives the missing rows of its share of a stack, and returns the rows of the updates: no
process ever holds all matrices (as in Dion, Ahn et al. 2025, arXiv:2504.05295).

A device flag, `found_inf`, can skip an update, as in PyTorch's fused kernels, without a CPU-GPU sync. If it is 1, each gradient
is replaced by the momentum, which leaves the momentum unchanged bit for bit; weights do not decay and updates become zero. NaN
or infinite gradients never enter a computation.

Limits: without shards, gradients must be equal in all processes (as after DDP). A skipped update overwrites the gradients of
matrices.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.optim.adamw import AdamW, avoid_compiler_import
from bardling.optim.polar import coefficients, newton_schulz

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""PyTorch 2.13 renames this collective; the old name prints a warning on every process."""


class MatrixExchange(Protocol):
    """Moves matrices between processes that hold rows of all of them and processes that hold some of them whole. With tensor
    parallelism, rows may be those of some columns only."""

    def whole(self, matrices: Sequence[tuple[nn.Parameter, int, int]], rows: Sequence[Tensor]) -> Tensor:
        """This process's share of k matrices, whole: [ceil(k / processes), m, n], zero beyond the last. Collective.

        Args:
            matrices: parameter, first and last + 1 of its rows, of each. rows: those of each that this process holds.
        """

    def rows(self, matrices: Sequence[tuple[nn.Parameter, int, int]], whole: Tensor) -> list[Tensor]:
        """The inverse: the rows of each matrix that this process holds. Collective."""

    def held(self, parameter: nn.Parameter, first: int, last: int) -> slice:
        """Where this process's shard of a parameter has the rows from `first` to before `last`."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape of the parameter of which this process holds a shard."""


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
        exchange: of a sharded model, whose processes then share the work in place of those above.

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
        exchange: MatrixExchange | None = None,
    ) -> None:
        rest = [group for group in groups if not group.get("muon")]
        avoid_compiler_import()
        # Shares its groups (the same dictionaries) and its state with this optimizer, see `step`.
        self._adamw = AdamW(rest) if rest else None
        super().__init__(groups, defaults={"lr": 0.0, "muon": False})
        self._splits: dict[Tensor, tuple[int, ...]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else []:
                shape = parameter.shape if exchange is None else exchange.shape(parameter)
                rows = tuple((splits or {}).get(parameter, (shape[0],)))
                if len(shape) != 2 or sum(rows) != shape[0] or min(rows) < 1:
                    raise ValueError(f"Muon needs matrices whose parts add up to their rows: shape {list(shape)}, parts {rows}")
                self._splits[parameter] = rows
        self._dtype, self._cautious, self._exchange = dtype, cautious, exchange
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
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        if skip is not None:
            for gradient, momentum in zip(gradients, momenta, strict=True):
                torch.where(skip, momentum, gradient, out=gradient)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])

        stacks: dict[tuple[int, int], list[_Part]] = {}
        for weight, gradient, momentum in zip(weights, gradients, momenta, strict=True):
            for shape, part in self._parts(weight, gradient, momentum):
                stacks.setdefault(shape, []).append(part)
        # Start all stacks before waiting for the first.
        started = [(shape, parts, self._start_polar(shape, parts, group["momentum"])) for shape, parts in stacks.items()]
        for shape, parts, wait in started:
            updates = wait()
            if skip is not None:
                for update in updates:
                    update.masked_fill_(skip, 0.0)
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            self._apply([part.weight for part in parts], updates, group, scale, skip)

    def _parts(self, parameter: nn.Parameter, gradient: Tensor, momentum: Tensor) -> Iterator[tuple[tuple[int, int], "_Part"]]:
        """The shape of each part of a weight, and what this process holds of it."""
        shape = parameter.shape if self._exchange is None else self._exchange.shape(parameter)
        columns, first = shape[1], 0
        for rows in self._splits[parameter]:
            held = slice(first, first + rows)
            if self._exchange is not None:
                held = self._exchange.held(parameter, first, first + rows)
            views = (tensor.detach()[held] for tensor in (gradient, momentum, parameter))
            yield (rows, columns), _Part((parameter, first, first + rows), *views)
            first += rows

    def _start_polar(self, shape: tuple[int, int], parts: Sequence["_Part"], mu: float) -> Callable[[], Sequence[Tensor]]:
        """Start to compute the polar factors of parts [m, n]; the result is a function that returns what this process updates
        of each."""
        matrices = [part.matrix for part in parts]
        if (exchange := self._exchange) is not None:
            updates = torch._foreach_lerp([part.gradient for part in parts], [part.momentum for part in parts], mu)
            factors = self._polar(exchange.whole(matrices, [update.to(self._dtype) for update in updates]))
            return lambda: exchange.rows(matrices, factors)
        per_process = -(-len(parts) // self._world_size)  # the last processes may have fewer
        stack = torch.zeros((per_process, *shape), dtype=self._dtype, device=parts[0].gradient.device)
        own = parts[self._rank * per_process : (self._rank + 1) * per_process]
        if own:  # the last processes may have none
            found = torch._foreach_lerp([part.gradient for part in own], [part.momentum for part in own], mu)
            torch._foreach_copy_(list(stack[: len(own)].unbind()), found)
        factors = self._polar(stack)
        if self._world_size == 1:
            return factors.unbind
        gathered = factors.new_empty((per_process * self._world_size, *shape))
        work = _all_gather(gathered, factors, group=self._process_group, async_op=True)

        def wait() -> Sequence[Tensor]:
            if work is not None:
                work.wait()
            return gathered[: len(parts)].unbind()

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
    """A matrix to orthogonalize: rows of a weight that belong together, or those of them that this process holds."""

    matrix: tuple[nn.Parameter, int, int]  # the weight, the part's first row and the one after its last
    gradient: Tensor  # the tensors are views
    momentum: Tensor
    weight: Tensor
