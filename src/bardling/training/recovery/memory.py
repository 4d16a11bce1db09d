"""How many sequences fit into a forward pass, and what happens when memory runs out.

`train.micro_batch = "auto"` is decided on the device, with the real model and shapes. On a GPU it is the largest divisor of a
process's sequences per step that passes forward and backward beside the memory the optimizer will need. On a CPU, where running
out of memory may kill the process without a message, it is the fastest of the sizes that fit by calculation.

If memory runs out in the first steps, the micro-batch is halved and the number of passes doubled: the same sequences, loss and
gradients, up to the order of summation (and dropout masks, which are drawn for each pass). A single process does so within the
step. Several processes cannot, because the others already wait for the gradients of the failed one: they try the largest pass
together before the first step. Later, running out of memory ends the run with an error that names the setting to change.

Limits: nothing is retried if memory runs out during the update, which may have changed some of the weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from bardling.config import ModelConfig, OptimConfig, TrainConfig, TuneConfig
from bardling.data.batches.loader import Batch
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import free_memory, synchronize
from bardling.distributed.heartbeat import LONG_PATIENCE
from bardling.distributed.pipeline import Pipeline, Stage
from bardling.errors import UserError, out_of_memory
from bardling.files.paths import shell_path
from bardling.model.gpt import GPT
from bardling.model.lora import add_adapters
from bardling.planning.activations import activation_bytes
from bardling.planning.batching import TrainPlan
from bardling.planning.costs import float32_bytes, weight_bytes
from bardling.planning.layout import idle_fraction
from bardling.planning.memory import optimizer_bytes
from bardling.planning.parameter_shapes import trained_shapes
from bardling.training.build import Execution, build_model, build_sharded
from bardling.training.objective import Forward, Objective, build_objective

FIRST_STEPS = 3
"""Steps in which the micro-batch is reduced if memory runs out; the first two allocate all that training needs."""

_MAX_PASSES = 1024  # per step, for `train.micro_batch = "auto"`
_FRACTION_OF_FREE = 0.7  # of a CPU's free memory that activations may use, besides other processes
_MIN_SPEEDUP = 1.05  # of a larger pass, to be chosen on a CPU
_SEARCH_SECONDS = 20.0  # limit of the search on a CPU


def divisors(sequences: int) -> list[int]:
    """Sizes of passes that divide `sequences`, largest first."""
    return [size for size in range(sequences, 0, -1) if sequences % size == 0]


class UpdateTracker:
    """Knows whether an optimizer is changing the weights right now."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.updating = False
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "updating", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "updating", False))


def choose_micro_batch(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    plan: TrainPlan,
    execution: Execution,
    context: Context,
    *,
    tune: TuneConfig,
    tokenizer: Tokenizer | None,
    document_mask: bool,
) -> tuple[int, str] | None:
    """Sequences of a forward pass, and why, if they are open or have to be reduced; None: as planned."""
    several_gpus = context.world_size > 1 and context.device.type == "cuda"
    if train.micro_batch != "auto" and not several_gpus:
        return None
    objective = build_objective(train, tokenizer, context.device)
    sequences = plan.micro_batch * plan.accumulation
    trial = TrialPasses(model, optim, execution, context, document_mask, objective, tune, sequences)
    if train.micro_batch == "auto":
        return trial.choose(sequences)
    micro_batch = trial.largest([size for size in divisors(sequences) if size <= plan.micro_batch])
    if micro_batch == plan.micro_batch:
        return None
    return micro_batch, f"the largest that fits into the memory of {context.device}"


@dataclass
class TrialPasses:
    """Forward and backward passes of a run's shapes, through a model created for the trial."""

    config: ModelConfig
    optim: OptimConfig  # its memory must fit beside a pass
    execution: Execution
    context: Context
    document_mask: bool
    objective: Objective
    tune: TuneConfig = field(default_factory=TuneConfig)
    sequences: int = 1  # of a process's step, which decide how many passes a stage of a pipeline has at a time
    _model: GPT | None = None

    def attempt(self, micro_batch: int) -> float | None:
        """Seconds of one forward and backward pass; None if memory runs out."""
        self.context.activity(f"trying passes of {micro_batch} sequences", LONG_PATIENCE)
        try:
            seconds: float | None = self._forward_backward(micro_batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            seconds = None
        if self._model is not None:
            self._model.zero_grad(set_to_none=True)
        if seconds is None and self.context.device.type == "cuda":
            torch.cuda.empty_cache()  # here the pass's tensors have been freed
        return seconds

    def _forward_backward(self, micro_batch: int) -> float:
        device, reserved = self.context.device, list[torch.Tensor]()
        if self._model is None:
            self._model = self._build().train()
        if device.type == "cuda":  # what the optimizer, the EMA and CUDA graphs will hold beside a pass, and a margin
            margin = torch.cuda.get_device_properties(device).total_memory // 33
            shapes, shards = trained_shapes(self.config, self.tune), self._parts
            weights = float32_bytes(shapes) // shards
            copies = [weights for needed in (self.optim.ema_decay, self.execution.cuda_graphs) if needed]
            state = optimizer_bytes(shapes, self.optim) // shards
            reserved += [torch.empty(size, dtype=torch.uint8, device=device) for size in (state, margin, *copies)]
        batch = self._batch(micro_batch)
        begin = time.perf_counter()
        if isinstance(self._model, Stage):
            passes, autocast = self.sequences // micro_batch, self.execution.precision.autocast
            flying = Pipeline(self._model, self.execution.schedule).rehearse(batch, passes, self._loss, autocast)
            synchronize(device)
            return (time.perf_counter() - begin) / flying / (1 - idle_fraction(self._model.count, passes))
        with self.execution.precision.autocast():
            loss = self.objective(cast(Forward, self._model), batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        return time.perf_counter() - begin

    def _build(self) -> GPT:
        if self._parts > 1:
            return build_sharded(self.config, self.execution, self.context, seed=0)[0]
        model = build_model(self.config, self.execution, self.context.device, seed=0)
        if self.tune.lora_rank:
            add_adapters(model, self.tune, seed=0)
        return model

    @property
    def _parts(self) -> int:
        """Number of processes among which the model is divided."""
        return self.context.size("shard") * self.context.size("pipeline")

    def _loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return self.objective(forward, batch).loss

    def _batch(self, micro_batch: int) -> Batch:
        device, length = self.context.device, self.config.block_size
        tokens = torch.randint(self.config.vocab_size, (micro_batch, length), device=device)
        if not self.document_mask:
            return Batch(tokens, tokens)
        # One document in every sequence needs no less memory than several.
        return Batch(tokens, tokens, torch.arange(micro_batch + 1, device=device, dtype=torch.int32) * length)

    def largest(self, sizes: list[int]) -> int:
        """The first of `sizes` (in decreasing order) that fits in all processes.

        Raises:
            UserError: none does.
        """
        for size in sizes:
            if not self.context.any(self.attempt(size) is None):
                return size
        raise UserError(
            f"train.micro_batch = {sizes[-1]}: does not fit into the memory of {self.context.device}: "
            f"{_remedy(self.execution.recompute)}"
        )

    def choose(self, sequences: int) -> tuple[int, str]:
        """The size that `train.micro_batch = "auto"` means for a process's `sequences` per step, and why."""
        device, context = self.context.device, self.context
        sizes = [size for size in divisors(sequences) if sequences // size <= _MAX_PASSES]
        free = free_memory(device)
        if free is not None:
            average = float32_bytes(trained_shapes(self.config, self.tune)) if self.optim.ema_decay else 0
            held = (weight_bytes(self.config) + average) // self._parts  # neither exists yet
            budget = free - held if device.type == "cuda" else _FRACTION_OF_FREE * (free / context.world_size - held)
            sizes = [size for size in sizes if self.required_bytes(size) <= budget] or sizes[-1:]
        # All processes must try the same sizes, those that fit everywhere.
        limit = -context.largest(-sizes[0])
        sizes = [size for size in sizes if size <= limit]
        if device.type == "cuda":
            return self.largest(sizes), "the largest that fits"
        # All processes run every trial, and the primary's times decide.
        fastest = fastest_size(sizes, lambda size: context.broadcast(self.attempt(size)))
        return fastest, "the smallest that is about as fast as any"

    def required_bytes(self, micro_batch: int) -> int:
        """Memory for the activations of one pass."""
        found = activation_bytes(
            self.config,
            micro_batch,
            precision=self.execution.precision.name,
            device_type=self.context.device.type,
            fp8=self.execution.fp8,
            recompute="blocks" if self.execution.recompute else "none",
            document_mask=self.document_mask,
        )
        return found.blocks + found.embedding_and_head + found.recompute_buffer


def fastest_size(sizes: list[int], attempt: Callable[[int], float | None]) -> int:
    """The smallest of `sizes` that is about as fast per sequence as any: doubles the size as long as that pays.

    Args:
        attempt: seconds of a pass of the given size; None if memory runs out.
    """
    best, speed, end = 0, 0.0, time.monotonic() + _SEARCH_SECONDS
    increasing = sorted(sizes)
    attempt(increasing[0])  # the first pass includes set-up
    for size in increasing:
        if best and size < 2 * best:
            continue
        seconds = attempt(size)
        if seconds is None or (best and size / seconds < speed * _MIN_SPEEDUP):
            break
        best, speed = size, size / max(seconds, 1e-9)
        if time.monotonic() > end:
            break
    return best or increasing[0]


def _remedy(recompute: bool) -> str:
    """What to do if not even one sequence fits."""
    return f"{'' if recompute else 'set --train.recompute blocks, '}shorten model.block_size, or use a smaller model"


def reduced_micro_batch(plan: TrainPlan, model: GPT, device: torch.device, step: int, run: Path | None, *, retry: bool) -> int:
    """The size of passes to continue with after memory ran out: at most half as large. Frees the memory of the failed step.

    Args:
        run: the folder with which it can be resumed; None if it has completed no step.
        retry: whether the step may be repeated.

    Raises:
        UserError: the run must end; the message names the setting with which it can be resumed.
    """
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = next((size for size in divisors(plan.micro_batch * plan.accumulation) if 2 * size <= plan.micro_batch), None)
    if size is not None and retry and plan.data_size == 1:
        return size
    start = "start with:" if run is None else f"continue with: bardling resume {shell_path(run)}"
    remedy = f"{start} --train.micro_batch {size}" if size else _remedy(model.recompute)
    where = f"the memory of {device} ran out at step {step + 1}"
    raise UserError(f"train.micro_batch = {plan.micro_batch}: {where}: {remedy}") from None
