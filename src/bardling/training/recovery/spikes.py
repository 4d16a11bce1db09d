"""What counts as a bad step: a loss or gradient norm that is NaN, infinite, or far above that of recent steps.

A spike is judged by a robust z-score: the distance from the median of recent steps in units of their median absolute
deviation, which a single outlier moves as little as it moves the median (B. Iglewicz and D. C. Hoaglin, "How to Detect and
Handle Outliers", 1993). The deviation is scaled to the standard deviation of a normal distribution. It is at least a small
fraction of the median, because a loss that hardly moves has almost none.

The limits of step n come from the good steps up to n - 2: the metrics of step n - 1 may still be on their way from the device.
The rule is the same on all devices, so that a resumed run judges as an uninterrupted one.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from bardling.config import GuardConfig
from bardling.errors import UserError

LARGEST = 3.4e38  # about float32's largest number; infinity and NaN are not below it
LAG = 2  # steps between a step and the last one that its limits use
_MAD_TO_STD = 1.4826  # ratio of the standard deviation to the median absolute deviation of a normal distribution
_NEGLIGIBLE_LOSS = 1e-3  # below it (nats), gradients may round to zero
_MIN_LOSS_DEVIATION, _MIN_NORM_DEVIATION = 0.01, 0.1  # as a fraction of the median


@dataclass(frozen=True)
class Limits:
    """The largest loss (nats) and gradient norm that are not bad; NaN exceeds every limit."""

    loss: float = LARGEST
    grad_norm: float = LARGEST


def require_gradient(step: int, loss: float, grad_norm: float) -> None:
    """Raise `UserError` if a step has a loss but no gradient: whatever computed it is wrong, and nothing would be learned."""
    if grad_norm == 0 and loss > _NEGLIGIBLE_LOSS:
        raise UserError(
            f"step {step:,}: the loss is {loss:.4g}, but every gradient is zero, so the model cannot learn: compiled code can "
            "be wrong on some devices and PyTorch versions; use --compile off, or another version of PyTorch"
        )


@dataclass
class StepHistory:
    """Loss and gradient norm of the latest good steps, and how many bad ones followed; part of a run's state."""

    steps: list[int] = field(default_factory=list)  # increasing
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    skipped: int = 0  # consecutive bad steps
    overflows: int = 0  # float16: consecutive gradients too large for the scale
    rollbacks: int = 0  # since the run started

    def add(self, step: int, loss: float, grad_norm: float, window: int) -> None:
        """Add the metrics of a good step and drop those that no limit will need."""
        self.skipped = self.overflows = 0
        self.steps.append(step)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        if len(self.steps) > window + LAG:
            del self.steps[0], self.loss[0], self.grad_norm[0]

    def forget(self) -> None:
        """Drop all steps: the next ones are no longer comparable with them."""
        self.steps, self.loss, self.grad_norm, self.skipped = [], [], [], 0

    def _reference(self, step: int, config: GuardConfig, since: int) -> slice:
        """The entries that a step is compared with."""
        end = sum(earlier <= step - LAG for earlier in self.steps)
        return slice(max(0, end - config.window, sum(earlier < since for earlier in self.steps)), end)

    def limits(self, step: int, config: GuardConfig, since: int = 0) -> Limits:
        """The limits of a step, counted from 1, from steps since `since`: earlier ones had another context length."""
        reference = self._reference(step, config, since)
        return Limits(
            _limit(self.loss[reference], config.loss_z, _MIN_LOSS_DEVIATION, config),
            _limit(self.grad_norm[reference], config.grad_norm_z, _MIN_NORM_DEVIATION, config),
        )

    def reason(self, step: int, loss: float, grad_norm: float, config: GuardConfig, since: int = 0) -> str:
        """Why a step is bad, with the numbers; empty when it is not."""
        limits, reference = self.limits(step, config, since), self._reference(step, config, since)
        reasons = []
        for name, value, limit, values, z in (
            ("loss", loss, limits.loss, self.loss[reference], config.loss_z),
            ("gradient norm", grad_norm, limits.grad_norm, self.grad_norm[reference], config.grad_norm_z),
        ):
            if not math.isfinite(value):
                reasons.append(f"the {name} is {'NaN' if math.isnan(value) else 'infinite'}")
            elif value > limit:
                median = statistics.median(values)
                score = z * (value - median) / (limit - median)
                reasons.append(
                    f"the {name} {value:.4g} is {score:.1f} deviations above {median:.4g}, "
                    f"the median of {len(values)} recent steps (limit {z:g})"
                )
        return " and ".join(reasons)

    @classmethod
    def from_json(cls, values: Any, where: str) -> "StepHistory":
        """The inverse of `asdict`; an empty history for None, which checkpoints of earlier versions give.

        Raises:
            UserError: naming `where`, if `values` is not what `asdict` returns.
        """
        if values is None:
            return cls()
        lists, counts = (
            [values.get(name) if isinstance(values, dict) else None for name in names]
            for names in (("steps", "loss", "grad_norm"), ("skipped", "overflows", "rollbacks"))
        )
        valid = all(isinstance(numbers, list) and len(numbers) == len(lists[0] or []) <= 20_000 for numbers in lists)
        valid = valid and all(type(count) is int and count >= 0 for count in counts)
        valid = valid and all(type(step) is int for step in lists[0] or [])
        valid = valid and all(type(x) in (int, float) and abs(x) < 1e300 for numbers in lists[1:] for x in numbers or [])
        if not valid:
            raise UserError(f"{where}: its guard history is invalid: the checkpoint is damaged; resume from another one")
        return cls(*(list(numbers or []) for numbers in lists), *counts)  # type: ignore[arg-type]


def _limit(values: list[float], z: float, min_deviation: float, config: GuardConfig) -> float:
    if not z or len(values) < config.window // 2:
        return LARGEST
    median = statistics.median(values)
    deviation = _MAD_TO_STD * statistics.median(abs(value - median) for value in values)
    return median + z * max(deviation, min_deviation * abs(median))
