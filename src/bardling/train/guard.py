"""Bad numbers: noticed, explained, and left out, undone or taken as the end, as `guard.policy` says.

A step is bad when its loss or gradient norm is no number or a spike (`spikes.py`). Its update is never made (`step.py`),
whatever the policy; what the policies differ in is what follows:

- skip: the step counts as done, and training goes on. `max_skips` bad steps in a row end the run.
- rollback: the run goes back to its last checkpoint, and passes over the step's windows from then on (`rollbacks.py`).
  After `max_rollbacks` of them the next bad step ends the run.
- stop: the run ends; its checkpoints are from before.

Nothing waits for a GPU in every step: its figures are copied to pinned memory behind the step and read one step later, while
the next one runs. Work that must not see an unjudged state (saving) calls `settle` first, which waits. All processes come to
the same verdict, since the figures are those of all and the vote is part of the step.

With float16 a gradient that is too large for its scale is a normal part of finding the scale; it counts only when it happens
`_OVERFLOWS` times in a row.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bardling.config import GuardConfig
from bardling.data.order import WindowOrder
from bardling.data.skips import PassingOrder, Range
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.monitor.records import EventRecord, Record
from bardling.train.explain import Explainer, told
from bardling.train.plan import TrainPlan
from bardling.train.rollbacks import Rollback
from bardling.train.spikes import Limits
from bardling.train.state import TrainState
from bardling.train.step import StepResult
from bardling.train.trace import order_of

_OVERFLOWS = 10


class RollBack(Exception):  # noqa: N818  a request, not an error
    """The run is to go back to its last checkpoint and pass over some windows."""

    def __init__(self, rollback: Rollback) -> None:
        super().__init__(f"bad step {rollback.event.step}")
        self.rollback = rollback


@dataclass(frozen=True)
class _Figures:
    """Loss, gradient norm and verdict of a step, perhaps still on their way from the device."""

    step: int
    first: int  # sample
    count: int
    values: Tensor  # float32 [3] in host memory
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, bad = self.values.tolist()
        return loss, norm, bool(bad)


class Guard:
    """Watches the steps of one run.

    Args:
        order: of the data.
        rollbacks: of the run so far.
        explainer: the primary process's.
        plan: of the steps' shapes; absent: they are all the same.
        log: takes the events.
        tell: says a line to the person who watches.
        late: judge each step after the next one; absent: on CUDA.
    """

    def __init__(
        self,
        config: GuardConfig,
        context: Context,
        order: WindowOrder,
        rollbacks: tuple[Rollback, ...],
        explainer: Explainer | None,
        *,
        plan: TrainPlan | None = None,
        log: Callable[[Record], None],
        tell: Callable[[str], None],
        late: bool | None = None,
    ) -> None:
        self._config, self._context, self._explainer = config, context, explainer
        self._data, self.rollbacks, self._plan = order, rollbacks, plan
        self._log, self._tell = log, tell
        self._late = context.device.type == "cuda" if late is None else late
        self._waiting: deque[_Figures] = deque()

    @property
    def order(self) -> PassingOrder:
        """The order of the run's samples: without what rollbacks pass over."""
        return order_of(self._data, self.rollbacks)

    def pass_over(self, rollback: Rollback) -> None:
        """Take a rollback into account; it has been recorded."""
        self.rollbacks = (*self.rollbacks, rollback)
        self._waiting.clear()

    def limits(self, state: TrainState) -> Limits | None:
        """What the next step must not exceed; None when nothing is looked at."""
        if self._config.policy == "off":
            return None
        return state.recent.limits(state.step + 1, self._config, self._since(state.step + 1))

    def _since(self, step: int) -> int:
        """Number, counted from 1, of the first step with the context of `step`: more context has a loss of its own."""
        return 0 if self._plan is None else self._plan.context_since(step - 1) + 1

    def judge(self, state: TrainState, result: StepResult, samples: int) -> None:
        """Look at the step that `state` has just made, of `samples` samples, or on CUDA at the one before.

        Raises:
            RollBack: the run is to go back.
            UserError: it is to end.
        """
        for rollback in self.rollbacks:
            # What once happened in this step is written down when it is done at last: so it stands once in the run's figures,
            # wherever the run was interrupted meanwhile.
            if rollback.event.step == state.step:
                self._log(rollback.event)
        if result.bad is None:
            return
        self._waiting.append(_figures(state.step, state.samples - samples, samples, result))
        while len(self._waiting) > (1 if self._late else 0):
            self._judge(state, self._waiting.popleft())

    def settle(self, state: TrainState) -> None:
        """Judge every step so far; raises as `judge`."""
        while self._waiting:
            self._judge(state, self._waiting.popleft())

    def _judge(self, state: TrainState, figures: _Figures) -> None:
        loss, norm, bad = figures.read()
        recent, config = state.recent, self._config
        if not bad:
            recent.add(figures.step, loss, norm, config.window)
            return
        if state.scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
            recent.overflows += 1
            if recent.overflows < _OVERFLOWS:
                return
        recent.skipped += 1
        action: Literal["skip", "rollback", "stop"] = "stop"
        end = "guard.policy = 'stop': resume with --guard.policy skip (or rollback) to go on past it"
        if config.policy == "rollback":
            action = "rollback" if len(self.rollbacks) < config.max_rollbacks else "stop"
            end = f"it would be rollback {len(self.rollbacks) + 1}, but guard.max_rollbacks = {config.max_rollbacks}: "
            end += "lower optim.lr, look at the data, or resume with a higher limit"
        elif config.policy == "skip":
            action = "skip" if recent.skipped < config.max_skips else "stop"
            end = f"it is bad step {recent.skipped} in a row (guard.max_skips = {config.max_skips}), so training has diverged: "
            end += "lower optim.lr, or resume with --guard.policy rollback"
        places = self.order.places(figures.first, figures.count)
        # As the primary found it; the others wait.
        event = self._context.broadcast(self._explain(state, figures, loss, norm, action, places))
        assert event is not None
        if action == "rollback":
            self._tell(f"{in_words(event)}; going back to the last checkpoint, to pass over these windows")
            raise RollBack(Rollback(event, tuple(places)))
        self._log(event)
        if action == "stop":
            raise UserError(f"{in_words(event)}; training ends: {end}")
        self._tell(f"{in_words(event)}; its update was left out")

    def _explain(
        self,
        state: TrainState,
        figures: _Figures,
        loss: float,
        norm: float,
        action: Literal["skip", "rollback", "stop"],
        places: list[Range],
    ) -> EventRecord | None:
        """The event in the primary process."""
        if self._explainer is None:
            return None
        self._context.doing(f"explaining step {figures.step}")
        context = None if self._plan is None else self._plan.at(figures.step - 1).context
        windows = self._explainer.windows(state, places, context)
        worst = windows[0]["sample"] if windows and self._late else None
        return EventRecord(
            step=figures.step,
            action=action,
            reason=state.recent.reason(figures.step, loss, norm, self._config, self._since(figures.step))
            or "a spike in another process",
            loss=loss,
            grad_norm=norm,
            samples=[list(place) for place in places],
            windows=windows,
            tensors=self._explainer.tensors(state, worst, context),
        )


def _figures(step: int, first: int, count: int, result: StepResult) -> _Figures:
    assert result.bad is not None
    values = torch.stack([result.loss.float(), result.grad_norm.float(), result.bad.float()]).detach()
    if not values.is_cuda:
        return _Figures(step, first, count, values.cpu(), None)
    host = torch.empty(3, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return _Figures(step, first, count, host, arrived)


def in_words(event: EventRecord) -> str:
    """An event in one line."""
    parts = [f"step {event.step:,}: {event.reason}"]
    if event.windows:
        repeated = math.isfinite(event.loss) or not math.isfinite(float(event.windows[0]["loss"]))
        parts.append(f"worst window: {told(event.windows[0])}" if repeated else "computed again, no window gives such a loss")
    if event.tensors:
        largest = event.tensors[0]
        wrong = f"{largest['nonfinite']:,} entries that are no numbers, " if largest["nonfinite"] else ""
        parts.append(
            f"largest gradient: {largest['name']} ({wrong}norm {float(largest['grad_norm']):.3g}, "
            f"weights' rms {float(largest['weight_rms']):.3g})"
        )
    return "; ".join(parts)
