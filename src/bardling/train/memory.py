"""How many sequences fit into a forward pass, and what happens when they do not.

`train.micro_batch = "auto"` is decided on the device, with the real model and shapes: on a GPU the largest divisor of a
process's share of the batch that passes forward and backward beside what the optimizer will need; on a CPU, where too much
memory ends the process without a word, what fits by arithmetic, and of that what is fastest.

Memory that runs out in the first steps halves the micro-batch and doubles the number of passes: the same sequences, loss and
gradients, but for the order of sums (and the masks of dropout, which are drawn for each pass). A single process does so in the
step itself. Several cannot: the others already wait for the gradients of the one that failed. They rehearse the largest pass
together before the first step. Later on, memory that runs out ends the run with the setting to change.

Limits: memory that runs out while the weights are being updated leaves them half done, so nothing is tried then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bardling.config import RunConfig
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.distributed.watch import LONG
from bardling.errors import UserError
from bardling.interop.shapes import parameter_shapes
from bardling.model.activations import activation_bytes
from bardling.model.arithmetic import weight_bytes
from bardling.model.gpt import GPT
from bardling.optim.kinds import optimizer_bytes
from bardling.train.plan import TrainPlan

FIRST_STEPS = 3
"""Steps in which memory that runs out is answered by smaller passes; the first two allocate all that training needs."""

_PART_OF_FREE = 0.7  # of a CPU's free memory that activations may take; other processes live there too
_WORTH = 1.05  # a larger pass must be this much faster to be taken on a CPU
_PATIENCE = 20.0  # seconds that the search on a CPU may take


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on a GPU or in the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "out of memory" in text)


def divisors(share: int) -> list[int]:
    """Sizes of passes into which `share` sequences divide, from the largest down."""
    return [size for size in range(share, 0, -1) if share % size == 0]


def smaller(plan: TrainPlan) -> int | None:
    """The next size of a pass that is at most half as large; None when there is none."""
    return next((size for size in divisors(plan.micro_batch * plan.accumulation) if 2 * size <= plan.micro_batch), None)


class UpdateWatch:
    """Knows whether an optimizer is just changing the weights."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.under_way = False
        optimizer.register_step_pre_hook(lambda *_: self._set(True))
        optimizer.register_step_post_hook(lambda *_: self._set(False))

    def _set(self, value: bool) -> None:
        self.under_way = value


@dataclass
class Passes:
    """Tries forward and backward passes of the size that a run takes.

    Args:
        model: on its device.
        optimizer: the run's; what it holds on the device already (at a resume, all) needs no room beside a pass.
    """

    model: GPT
    context: Context
    precision: Precision
    config: RunConfig
    optimizer: torch.optim.Optimizer | None = None

    def attempt(self, micro_batch: int) -> float | None:
        """Seconds of one forward and backward pass; None when it does not fit. The model and its gradients are as before."""
        device, model = self.context.device, self.model
        vocab, length = self.config.model.vocab_size, self.config.model.block_size
        was_training, failed = model.training, False
        seconds, held = 0.0, list[torch.Tensor]()
        try:
            # What the optimizer will hold beside this, and something for what is not known.
            if device.type == "cuda":
                spare = torch.cuda.get_device_properties(device).total_memory // 33
                graphs = weight_bytes(self.config.model) if self.config.cuda_graphs else 0  # the gradients that these keep
                held += [torch.empty(size, dtype=torch.uint8, device=device) for size in (self._to_come(), spare, graphs)]
            tokens = torch.randint(vocab, (micro_batch, length), device=device)
            known = {}
            if self.config.data.document_mask:  # every window one document, which needs no less than several
                bounds = torch.arange(micro_batch + 1, device=device, dtype=torch.int32) * length
                known = {"documents": bounds}
            model.train()
            begin = time.perf_counter()
            with self.precision.autocast():
                loss = model(tokens, tokens, reduction="sum", **known)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begin
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = True
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        held.clear()
        tokens = loss = None  # type: ignore[assignment]  # before the cache is emptied
        if failed and device.type == "cuda":
            torch.cuda.empty_cache()
        return None if failed else seconds

    def largest(self, sizes: list[int]) -> int:
        """The first of `sizes` (from large to small) that fits in all processes.

        Raises:
            UserError: none does.
        """
        for size in sizes:
            self.context.doing(f"trying passes of {size} sequences", LONG)
            if not self.context.any(self.attempt(size) is None):
                return size
        raise UserError(
            f"train.micro_batch = {sizes[-1]}: not even this fits into the memory of {self.context.device}: "
            f"{_remedy(self.model)}"
        )

    def choose(self, share: int) -> tuple[int, str]:
        """The size that `train.micro_batch = "auto"` means for `share` sequences a process, and why."""
        device, context = self.context.device, self.context
        sizes = [size for size in divisors(share) if size == share or share // size <= 1024]
        free = _free_memory(device)
        if free is not None:
            room = free * (1.0 if device.type == "cuda" else _PART_OF_FREE / context.world_size)
            needs = {size: self._needed(size, device.type) for size in sizes}
            sizes = [size for size in sizes if needs[size] <= room] or sizes[-1:]
        # All processes must try the same sizes, the ones that fit everywhere.
        cap = -context.largest(-sizes[0])
        sizes = [size for size in sizes if size <= cap]
        if device.type == "cuda":
            return self.largest(sizes), "the largest that fits"
        chosen = sizes[-1]
        if context.is_primary:
            chosen = fastest(sizes, self.attempt)
        return context.broadcast(chosen), "the smallest of the fastest here"

    def _to_come(self) -> int:
        """Bytes that the optimizer will take on the device, besides those that it has there."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        values = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        there = sum(value.nbytes for value in values if value.device.type == self.context.device.type)
        return max(optimizer_bytes(parameter_shapes(self.config.model), self.config.optim) - there, 0)

    def _needed(self, micro_batch: int, device_type: str) -> int:
        made = activation_bytes(
            self.config.model,
            micro_batch,
            precision=self.precision.name,
            device_type=device_type,
            fp8=self.config.fp8,
            recompute=self.config.train.recompute,
            document_mask=self.config.data.document_mask,
        )
        return made.blocks + made.ends + made.again


def fastest(sizes: list[int], attempt: Callable[[int], float | None]) -> int:
    """The smallest of `sizes` that is nearly as fast, by sequence, as any: tries powers of two upwards as long as that pays."""
    best, speed, end = 0, 0.0, time.monotonic() + _PATIENCE
    rising = sorted(sizes)
    attempt(rising[0])  # the first pass pays for set-up
    for size in rising:
        if best and size < 2 * best:
            continue
        seconds = attempt(size)
        if seconds is None:
            break
        if best and size / seconds < speed * _WORTH:
            break
        best, speed = size, size / max(seconds, 1e-9)
        if time.monotonic() > end:
            break
    return best or rising[0]


def _free_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None when the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _remedy(model: GPT) -> str:
    """What to do when not even one sequence fits."""
    return f"{'' if model.recompute else 'set --train.recompute blocks, '}shorten model.block_size, or take a smaller model"


def no_room(plan: TrainPlan, model: GPT, device: torch.device, step: int, run: Path) -> UserError:
    """The error of a run that cannot make its passes smaller by itself."""
    less = smaller(plan)
    remedy = f"go on with: bardling resume {run} --train.micro_batch {less}" if less is not None else _remedy(model)
    return UserError(f"train.micro_batch = {plan.micro_batch}: the memory of {device} ran out at step {step + 1}: {remedy}")


def shrunk(error: BaseException, plan: TrainPlan, model: nn.Module, *, early: bool, updating: bool) -> int | None:
    """The size of passes to go on with after `error`, or None when the run must end. Frees what the failed step held."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not early or updating or plan.world_size > 1 or not out_of_memory(error):
        return None
    return smaller(plan)
