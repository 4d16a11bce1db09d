"""Training from a script or a notebook: a model, an optimizer and batches of one's own, without a run folder.

`fit_batches` is the same loop that runs use. Nothing is written to disk; every figure reaches `on_record` as a typed record
(`monitor/records.py`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from bardling.config import OptimConfig, TrainConfig
from bardling.data.loader import Batch
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.model.arithmetic import flops_per_token
from bardling.model.gpt import GPT
from bardling.monitor.records import Record
from bardling.optim.ema import Ema
from bardling.optim.schedule import learning_rate
from bardling.train.compiling import wrap
from bardling.train.hooks import Log, StepTimer, Validate
from bardling.train.loop import Hook, fit
from bardling.train.plan import make_plan
from bardling.train.state import TrainState

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
) -> TrainState:
    """Train `model` on (inputs, targets) batches and return the state it ends in.

    Args:
        model: on the device it is to be trained on.
        optimizer: over its parameters; `bardling.optim.build.build_optimizer` makes the usual one (it shares Muon's work among
            processes, if told of them).
        batches: pairs of int64 [batch, time] on the model's device, targets already shifted by one, -100 where no loss is
            wanted; `train.micro_batch` (unset: `train.batch_size`) rows each, `train.steps` times as many as a step takes.
        train: steps, batch sizes, clipping, logging.
        optim: the learning rate's schedule and the running mean (`TrainState.ema`); the optimizer's own settings stay.
        val_batches: held-out pairs, kept in memory; measured every `eval_every` steps and at the end.
        after_step: called after every step: to sample, save, or look.
        on_record: gets a `TrainRecord` every `train.log_every` steps and a `ValRecord` for each validation.
        precision: of matrix products; float32 when absent.
        context: of several processes each has its own batches, and gradients are those of all together.
        bytes_per_token: [vocab] UTF-8 bytes of each token, for bits per byte.
        seed: of dropout.

    Raises:
        UserError: the batches do not fit the configuration, there are too few of them, or it sets what this loop does not do.
    """
    optim = optim or OptimConfig()
    if train.deadline is not None:
        raise UserError(f"train.deadline = {train.deadline!r}: here only train.steps counts; leave it out")
    precision = precision or Precision("float32", "default", context.device.type)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserError("batches: there is none to train on")
    rows, time = first[0].shape
    plan = make_plan(train, time, context.world_size)
    if rows != plan.micro_batch:
        raise UserError(
            f"batches have {rows} rows, but a forward pass takes {plan.micro_batch}: set train.micro_batch = {rows}"
        )
    if (least := min(stage.micro_batch for stage in plan.stages)) < rows:
        raise UserError(
            f"batches have {rows} rows, but a forward pass of the first steps takes {least}: set train.batch_start to at least "
            f"{rows * context.world_size}"
        )
    timer, monitor = StepTimer(context.device), _Records(on_record)
    hooks: list[Hook] = [
        Log(
            monitor,
            plan,
            timer,
            every=train.log_every,
            windows_per_epoch=None,
            flops_per_token=partial(flops_per_token, model.config),
            peak_flops=None,
        )
    ]
    if val_batches is not None:
        hooks.append(
            Validate(
                monitor,
                timer,
                _Held(val_batches),
                every=eval_every,
                last=plan.steps,
                batch_size=rows,
                precision=precision,
                context=context,
                bytes_per_token=bytes_per_token,
                stop_requested=lambda: False,
            )
        )
    if after_step is not None:
        hooks.append(lambda state, result: None if result is None else after_step(state))
    model.recompute = model.recompute or train.recompute == "blocks"
    state = TrainState(model, optimizer)
    if precision.name == "float16":
        state.scaler = torch.amp.GradScaler(context.device.type)
    if optim.ema_decay:
        state.ema = Ema(dict(model.named_parameters()), optim.ema_decay)
    fit(
        state,
        _batches(itertools.chain([first], stream)),
        plan,
        lr_at=lambda step: learning_rate(step, optim, plan.steps),
        grad_clip=train.grad_clip,
        seed=seed,
        forward=wrap(model, compiled=False, context=context),
        precision=precision,
        context=context,
        hooks=hooks,
        bytes_per_token=bytes_per_token,
    )
    return state


def _batches(pairs: Iterable[Pair]) -> Iterator[Batch]:
    count = 0
    for count, (inputs, targets) in enumerate(pairs, 1):  # noqa: B007  told in the error below
        yield Batch(inputs, targets)
    raise UserError(f"batches: ended after {count}, before the last step")


class _Held:
    """Held-out pairs with the face of `EvalWindows`."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        inputs, targets = zip(*pairs, strict=True)
        self._inputs, self._targets = torch.cat(inputs), torch.cat(targets)
        self.n = len(self._inputs)

    def batch(self, first_sample: int, size: int) -> Batch:
        rows = slice(first_sample, first_sample + size)
        return Batch(self._inputs[rows], self._targets[rows])


class _Records:
    """Hands records to a function."""

    def __init__(self, take: Callable[[Record], None]) -> None:
        self.log = take

    def progress(self, label: str, done: int, total: int) -> None:
        """Nobody watches."""

    def flush(self) -> None:
        """Nothing is kept."""
