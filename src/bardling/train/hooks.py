"""What happens between steps: log, validate, sample, save.

Each hook decides from the step alone whether it is due, and notes in `state.hooks_done` the step at which it finished.
A checkpoint carries these notes: work that a signal interrupted is therefore done when the run resumes, and finished
work is not repeated.
"""

import contextlib
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch

from bardling.config import CheckpointConfig, EvalConfig, SampleConfig
from bardling.data.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import Precision, memory_used
from bardling.evaluate.loss import Interrupted, Windows, evaluate_loss
from bardling.evaluate.multiple_choice import evaluate_choices
from bardling.evaluate.tasks import draw_items, load_items, task_name
from bardling.generate import generate, prompt_ids
from bardling.monitor.records import Record, SampleRecord, TaskRecord, TrainRecord, ValRecord
from bardling.train.plan import Horizon, TrainPlan
from bardling.train.saving import Saver
from bardling.train.signals import Stopped
from bardling.train.state import TrainState
from bardling.train.step import StepResult


class Monitor(Protocol):
    """Where records go; only the primary process has real ones."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Show how far some long work has come."""


def due(step: int, every: int, last: int) -> bool:
    """Whether work that is done every `every` steps (0: never) and at the last step is due after `step` steps."""
    return step > 0 and (step == last or (every > 0 and step % every == 0))


class StepTimer:
    """Measures the seconds spent in steps, leaving out validation, samples and saving."""

    def __init__(self, device: torch.device, doing: Callable[[str], None] = lambda activity: None) -> None:
        self._device = device
        self.doing = doing  # told what is done besides the steps
        self._seconds = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    def step(self) -> None:
        """A step has been given to the device."""
        self._steps += 1

    def pause(self) -> None:
        """Stop the clock, once the device has finished what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += time.perf_counter() - self._since

    def go(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def take(self) -> float:
        """Seconds a step since the last `take`; the caller has just waited for the device."""
        now = time.perf_counter()
        seconds = (self._seconds + now - self._since) / max(self._steps, 1)
        self._seconds, self._steps, self._since = 0.0, 0, now
        return seconds


class Log:
    """Writes the step's figures every `every` steps, and at the first and last one."""

    def __init__(
        self,
        monitor: Monitor,
        plan: TrainPlan,
        timer: StepTimer,
        *,
        every: int,
        windows_per_epoch: int | None,
        flops_per_token: Callable[[int], int],  # by context
        peak_flops: float | None,
    ) -> None:
        self._monitor, self._plan, self._timer, self._every = monitor, plan, timer, every
        self._windows_per_epoch = windows_per_epoch
        self._flops_per_token = cache(flops_per_token)
        self._steps = 0  # since the last line
        self._peak_flops = None if peak_flops is None else peak_flops * plan.world_size

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Log the step if it is due."""
        if result is None:
            self._timer.go()
            return
        self._timer.step()
        self._steps += 1
        if state.step != 1 and not due(state.step, self._every, self._plan.steps):
            return
        # The only place where the host waits for the device.
        loss_sum = result.loss_sum.item()
        size = None if result.bytes is None else result.bytes.item()
        seconds = self._timer.take()
        # Steps of several stages may lie between two lines; those that a rollback undid had the shapes of these.
        first = max(state.step - self._steps, 0)
        tokens = self._plan.cost(lambda context: 1, first, state.step) / (state.step - first)
        flops = self._plan.cost(self._flops_per_token, first, state.step) / (state.step - first)
        self._steps = 0
        self._monitor.log(
            TrainRecord(
                step=state.step,
                loss=result.loss.item(),
                bits_per_byte=loss_sum / 0.6931471805599453 / size if size else None,
                lr=result.lr,
                grad_norm=result.grad_norm.item(),
                epoch=None if self._windows_per_epoch is None else state.samples / self._windows_per_epoch,
                tokens=state.samples * self._plan.block_size,
                tokens_per_second=tokens / seconds,
                mfu=None if self._peak_flops is None else flops / seconds / self._peak_flops,
                memory_bytes=memory_used(result.loss.device),
                seconds_left=self._plan.cost(self._flops_per_token, state.step) / flops * seconds,
                time=time.time(),
            )
        )


class _Timed:
    """Shared by the hooks that take long: due at intervals, once each, with the step timer stopped."""

    name: str
    measures = True  # whether the work is about the model that users get: the running mean of the weights, where one is kept

    def __init__(self, timer: StepTimer, every: int, last: Horizon | int) -> None:
        self._timer, self._every = timer, every
        self._horizon = last if isinstance(last, Horizon) else Horizon(last)
        self.seconds: float | None = None  # that the work took the last time

    @property
    def _last(self) -> int:
        return self._horizon.steps

    def is_due(self, state: TrainState) -> bool:
        return due(state.step, self._every, self._last)

    def work(self, state: TrainState) -> None:
        raise NotImplementedError

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Do the work if it is due and has not been done at this step."""
        if not self.is_due(state) or state.hooks_done.get(self.name) == state.step:
            return
        self._timer.pause()
        self._timer.doing(f"{self.name} after step {state.step}")
        begin = time.monotonic()
        with state.measured() if self.measures else contextlib.nullcontext():
            self.work(state)
        self.seconds = time.monotonic() - begin
        state.hooks_done[self.name] = state.step
        self._timer.go()


class Validate(_Timed):
    """Measures the loss on the fixed held-out windows."""

    name = "validate"

    def __init__(
        self,
        monitor: Monitor,
        timer: StepTimer,
        windows: Windows,
        *,
        every: int,
        last: Horizon | int,
        batch_size: int,
        precision: Precision,
        context: Context,
        bytes_per_token: torch.Tensor | None,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(timer, every, last)
        self._monitor, self._windows, self._batch_size = monitor, windows, batch_size
        self._precision, self._context = precision, context
        self._bytes_per_token, self._stop_requested = bytes_per_token, stop_requested

    def work(self, state: TrainState) -> None:
        """Validate, and note a new best loss."""
        try:
            result = evaluate_loss(
                state.model,
                self._windows,
                batch_size=self._batch_size,
                precision=self._precision,
                context=self._context,
                bytes_per_token=self._bytes_per_token,
                stop_requested=self._stop_requested,
                progress=lambda done, total: self._monitor.progress("validating", done, total),
            )
        except Interrupted:
            raise Stopped from None
        best = result.loss < state.best_val_loss
        if best:
            state.best_val_loss, state.best_step = result.loss, state.step
        self._monitor.log(ValRecord(state.step, result.loss, result.bits_per_byte, result.perplexity, best))


class Sample(_Timed):
    """Lets the model write; the primary process does it, the others wait."""

    name = "sample"

    def __init__(
        self,
        monitor: Monitor,
        timer: StepTimer,
        config: SampleConfig,
        tokenizer: Tokenizer,
        *,
        last: Horizon | int,
        seed: int,
        precision: Precision,
        context: Context,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(timer, config.every, last)
        self._monitor, self._config, self._tokenizer, self._seed = monitor, config, tokenizer, seed
        self._precision, self._context, self._stop_requested = precision, context, stop_requested

    def is_due(self, state: TrainState) -> bool:
        """Samples can be switched off, and then none are made after the last step either."""
        return self._config.every > 0 and super().is_due(state)

    def work(self, state: TrainState) -> None:
        """Write the samples of this step; the same ones in every repetition of the run."""
        texts: list[str] = []
        if self._context.is_primary:
            prompt = prompt_ids(self._tokenizer, self._config.prompt)
            rows: list[list[int]] = [[] for _ in range(self._config.num_samples)]
            was_training = state.model.training
            state.model.eval()
            for tokens in generate(
                state.model,
                [prompt] * self._config.num_samples,
                max_new_tokens=self._config.max_new_tokens,
                temperature=self._config.temperature,
                top_k=self._config.top_k,
                top_p=self._config.top_p,
                eot_id=self._tokenizer.eot_id,
                vocab_size=self._tokenizer.vocab_size,
                seed=self._seed + state.step,
                autocast=self._precision.autocast,
                should_stop=self._stop_requested,
            ):
                for row, token in zip(rows, tokens, strict=True):
                    if token is not None:
                        row.append(token)
            state.model.train(was_training)
            texts = [self._tokenizer.decode(row) for row in rows]
        if self._context.any(self._stop_requested()):
            raise Stopped
        if self._context.is_primary:
            self._monitor.log(SampleRecord(state.step, self._config.prompt, texts))


class Tasks(_Timed):
    """Measures multiple-choice tasks, shared out over the processes."""

    name = "tasks"

    def __init__(
        self,
        monitor: Monitor,
        timer: StepTimer,
        config: EvalConfig,
        tokenizer: Tokenizer,
        *,
        last: Horizon | int,
        seed: int,
        precision: Precision,
        context: Context,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(timer, config.every if config.tasks_every is None else config.tasks_every, last)
        self._monitor, self._tokenizer = monitor, tokenizer
        self._precision, self._context, self._stop_requested = precision, context, stop_requested
        if context.is_primary:  # downloads what is missing, once
            for task in config.tasks:
                load_items(task)
        context.barrier()
        self._items = {task_name(task): draw_items(load_items(task), config.task_items, seed) for task in config.tasks}

    def work(self, state: TrainState) -> None:
        """Measure all tasks; they are logged together, so that an interruption leaves none logged twice."""
        records = []
        for task, items in self._items.items():
            try:
                result = evaluate_choices(
                    state.model,
                    self._tokenizer,
                    items,
                    precision=self._precision,
                    task=task,
                    context=self._context,
                    stop_requested=self._stop_requested,
                    progress=partial(self._monitor.progress, task),
                )
            except Interrupted:
                raise Stopped from None
            records.append(
                TaskRecord(state.step, task, result.accuracy, result.accuracy_norm, result.stderr_norm, result.total)
            )
        for record in records:
            self._monitor.log(record)


class Checkpoint(_Timed):
    """Saves the state at intervals of steps or of time, after the last step, and at each new best validation loss."""

    name = "checkpoint"
    measures = False

    def __init__(
        self,
        timer: StepTimer,
        saver: Saver,
        config: CheckpointConfig,
        *,
        last: Horizon | int,
        context: Context,
        settle: Callable[[TrainState], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(timer, config.every_steps, last)
        self._settle = settle  # makes sure that the state is worth saving, or raises
        self._saver, self._save_best, self._seconds = saver, config.save_best, config.every_seconds
        self._context, self._clock, self._since = context, clock, clock()

    def is_due(self, state: TrainState) -> bool:
        """At intervals, at the end, and at a new best."""
        if super().is_due(state) or (self._save_best and state.best_step == state.step and state.step > 0):
            return True
        if self._seconds is None or state.step == 0:
            return False
        # The primary's clock decides for all.
        return self._context.any(self._context.is_primary and self._clock() - self._since >= self._seconds)

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Say if the last save failed, and begin one if it is due."""
        self._saver.report()
        if result is not None:
            self._saver.prepare(state)
        super().__call__(state, result)

    def work(self, state: TrainState) -> None:
        """Begin to save."""
        self._settle(state)
        state.hooks_done[self.name] = state.step
        self._saver.save(state, last=state.step == self._last)
        self._since = self._clock()
