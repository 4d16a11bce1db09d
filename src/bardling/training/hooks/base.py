"""Shared by hooks: when they are due, the step timer, and what they receive."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import Precision, synchronize
from bardling.evaluate.loss import Interrupted
from bardling.monitor.records import Record
from bardling.monitor.wandb import one_line
from bardling.planning.batching import TrainPlan
from bardling.training.hooks.may_fail import PeerFailed, WatchfulContext, attempt
from bardling.training.recovery.signals import Stopped
from bardling.training.state import TrainState
from bardling.training.step import StepResult


class Monitor(Protocol):
    """Where records go; only the primary process writes them."""

    def log(self, record: Record) -> None: ...

    def progress(self, label: str, done: int, total: int) -> None: ...

    def warn(self, text: str) -> None: ...


class StepTimer:
    """Measures the seconds spent in steps, excluding validation, samples and saving."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    def step(self) -> None:
        self._steps += 1

    def pause(self) -> None:
        """Stop the clock, once the device has finished its work."""
        synchronize(self._device)
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def take(self) -> float:
        """Seconds per step since the last `take`; the caller has just waited for the device."""
        now = time.perf_counter()
        seconds = (self._seconds + now - self._since) / max(self._steps, 1)
        self._seconds, self._steps, self._since = 0.0, 0, now
        return seconds


@dataclass(frozen=True)
class HookContext:
    """What every hook of a run receives."""

    monitor: Monitor
    timer: StepTimer
    plan: TrainPlan
    context: Context
    precision: Precision
    seed: int = 0
    tokenizer: Tokenizer | None = None
    bytes_per_token: Tensor | None = None  # [vocab] UTF-8 bytes of each token, on the device
    stop_requested: Callable[[], bool] = lambda: False


def due(step: int, every: int, last: int) -> bool:
    """Whether work that is due every `every` steps (0: never) and after the last step is due after `step` steps."""
    return step > 0 and (step == last or (every > 0 and step % every == 0))


class TimedHook(ABC):
    """A hook whose work takes long: it runs once whenever it is due, with the step timer paused."""

    name: str
    uses_ema = True  # whether the work uses the weights that users get: the EMA, if there is one
    may_fail = False  # whether an error of the work is a warning, and training continues

    def __init__(self, run: HookContext, every: int) -> None:
        self._watchful = WatchfulContext.of(run.context)
        self.run, self._every = replace(run, context=self._watchful) if self.may_fail else run, every
        self._warned = False
        self.seconds: float | None = None  # duration of the latest work

    def is_due(self, state: TrainState) -> bool:
        """Whether the work is due at this step; the same in every process."""
        return due(state.step, self._every, self.run.plan.steps)

    @abstractmethod
    def work(self, state: TrainState) -> None:
        """Do the work; `Interrupted` means that the run was asked to stop."""

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        if not self.is_due(state) or state.hooks_done.get(self.name) == state.step:
            return
        self.run.timer.pause()
        self.run.context.activity(f"{self.name} after step {state.step}")
        begin = time.monotonic()
        try:
            with state.evaluation_weights() if self.uses_ema else contextlib.nullcontext():
                if self.may_fail:
                    self._attempt(state)
                else:
                    self.work(state)
        except Interrupted:
            raise Stopped from None
        self.seconds = time.monotonic() - begin
        state.hooks_done[self.name] = state.step
        self.run.timer.resume()

    def _attempt(self, state: TrainState) -> None:
        """Do the work; the first failure is reported, by the processes in which it happened and by the primary one."""
        error = attempt(lambda: self.work(state), self._watchful)
        if error is None or self._warned or (isinstance(error, PeerFailed) and not self.run.context.is_primary):
            return
        self._warned = True
        reason = one_line(error) or type(error).__name__
        self.run.monitor.warn(f"{self.name} after step {state.step} failed; training continues without it: {reason}")
