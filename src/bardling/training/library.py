"""Training from a script or a notebook: your own model, optimizer and batches, without a run folder.

`fit_batches` runs the same loop as `bardling train`. Nothing is written to disk; all metrics reach `on_record` as typed records
(`monitor/records.py`). Iterators and callbacks of the caller run with the caller's defaults and random number generators.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from bardling.config import OptimConfig, TrainConfig
from bardling.data.batches.assemble import ValidationSet
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.distributed.global_state import isolated
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.monitor.records import Record
from bardling.planning.batching import TrainPlan, make_plan
from bardling.planning.costs import flops_per_token
from bardling.planning.schedules import learning_rate
from bardling.training.build import Execution, build
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.log import Log
from bardling.training.hooks.validate import Validate
from bardling.training.loop import Hook, fit
from bardling.training.objective import NextToken, Objective
from bardling.training.state import TrainState
from bardling.training.step import StepSettings

Pair = tuple[Tensor, Tensor]


def fit_batches(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Pair],
    train: TrainConfig,
    optim: OptimConfig | None = None,
    *,
    val_batches: Iterable[Pair] | None = None,
    eval_every: int = 0,
    after_step: Callable[[TrainState], None] | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    precision: Precision | None = None,
    context: Context = SINGLE,
    bytes_per_token: Tensor | None = None,
    seed: int = 0,
    objective: Objective | None = None,
) -> TrainState:
    """Train `model` on (inputs, targets) batches and return the final state.

    Args:
        model: on the device it is to be trained on.
        optimizer: over its parameters, as by `bardling.optim.build.build_optimizer` (rank and world size divide Muon's work).
        batches: pairs of int64 [batch, time] on the model's device; targets are already shifted by one, and -100 where no loss
            is wanted. `train.micro_batch` (default: `train.batch_size`) rows each; a step takes as many as it accumulates.
        train: steps, batch sizes, clipping, logging.
        optim: learning-rate schedule and EMA (`TrainState.ema`); settings of the optimizer itself are ignored.
        val_batches: held-out pairs, kept in memory; evaluated every `eval_every` steps and after the last one.
        after_step: called after every step: to sample, save, or inspect the state.
        on_record: gets a `TrainRecord` every `train.log_every` steps and a `ValRecord` for each validation.
        precision: of matmuls; float32 if None.
        context: with several processes, each has its own batches, and gradients are those of all together.
        bytes_per_token: [vocab] UTF-8 bytes of each token, to report bits per byte.
        seed: of dropout.
        objective: what a step minimises; next-token loss if None.

    Raises:
        UserError: the batches do not match `train`, there are too few of them, or `train` sets an unsupported option.
    """
    optim, precision = optim or OptimConfig(), precision or Precision("float32", "default", context.device.type)
    stream = iter(batches)
    first = next(stream, None)
    plan = _checked_plan(train, first, context)
    with isolated() as outside:
        monitor, timer = _CallbackMonitor(outside(on_record)), StepTimer(context.device)
        shared = HookContext(monitor, timer, plan, context, precision, seed=seed, bytes_per_token=bytes_per_token)
        execution = Execution(precision, recompute=train.recompute == "blocks")
        assembly = build(model, optim, execution, context, optimizer=optimizer)
        cost = cache(partial(flops_per_token, model.config))
        log = Log(shared, every=train.log_every, sequences_per_epoch=None, flops_per_token=cost, peak_flops=None)
        hooks: list[Hook] = [log]
        if val_batches is not None:
            validation = outside(_ValidationSet)(val_batches)
            hooks.append(Validate(shared, [ValidationSet("", 1.0, validation)], every=eval_every, batch_size=plan.micro_batch))
        if after_step is not None:
            called = outside(after_step)
            hooks.append(lambda state, result: None if result is None else called(state))
        settings = StepSettings(objective or NextToken(bytes_per_token), precision, context, grad_clip=train.grad_clip)
        source = _batches(first, outside(partial(next, stream, None)))
        fit(assembly, source, plan, settings, lr_at=lambda step: learning_rate(step, optim, plan.steps), seed=seed, hooks=hooks)
        return assembly.state


def _checked_plan(train: TrainConfig, first: Pair | None, context: Context) -> TrainPlan:
    """The batch arithmetic, which the batches must match, as the `first` one shows."""
    if first is None:
        raise UserError("batches: is empty; give at least one pair of inputs and targets")
    rows, time = first[0].shape
    if train.deadline is not None:
        raise UserError(f"train.deadline = {train.deadline!r}: fit_batches counts only train.steps; leave it out")
    plan = make_plan(train, time, context.data_size)
    if rows != plan.micro_batch:
        raise UserError(
            f"batches: have {rows} rows, but a forward pass takes {plan.micro_batch}: set train.micro_batch = {rows}"
        )
    if (smallest := min(stage.micro_batch for stage in plan.stages)) < rows:
        raise UserError(
            f"batches: have {rows} rows, but a forward pass of the first steps takes {smallest}: set train.batch_start to at "
            f"least {rows * context.data_size}"
        )
    return plan


def _batches(pair: Pair | None, following: Callable[[], Pair | None]) -> Iterator[Batch]:
    count = 0
    while pair is not None:
        yield Batch(*pair)
        count, pair = count + 1, following()
    raise UserError(f"batches: ended after {count}, before the last step; give more, or lower train.steps")


class _ValidationSet:
    """Held-out pairs with the interface of `EvalSequences`."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        inputs, targets = zip(*pairs, strict=True)
        self._inputs, self._targets = torch.cat(inputs), torch.cat(targets)
        self.n = len(self._inputs)

    def batch(self, first_sample: int, size: int) -> Batch:
        rows = slice(first_sample, first_sample + size)
        return Batch(self._inputs[rows], self._targets[rows])


class _CallbackMonitor:
    def __init__(self, on_record: Callable[[Record], None]) -> None:
        self.log = on_record

    def progress(self, label: str, done: int, total: int) -> None: ...

    def warn(self, text: str) -> None: ...
