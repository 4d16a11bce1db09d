"""What counts as a bad step: numbers that are none, and spikes far above the steps before.

A spike is judged by a robust z-score: the distance from the median of recent steps in units of their median absolute
deviation, which a single outlier moves as little as it moves the median (B. Iglewicz and D. C. Hoaglin, "How to Detect and
Handle Outliers", 1993). The deviation is scaled to a standard deviation of normal numbers, and taken to be at least a small
part of the median, for a loss that hardly moves has almost none.

The limits of step n come from the good steps up to n - 2: the figures of step n - 1 may still be on their way from the
device. One rule for all devices, so that a resumed run judges as an undisturbed one.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from bardling.config import GuardConfig
from bardling.errors import UserError

LARGEST = 3.4e38  # about float32's largest number: infinity and NaN are not below it
LAG = 2  # steps between a step and the last one that its limits know
_SCALE = 1.4826  # from the median absolute deviation to the standard deviation, for normal numbers
_LOSS_FLOOR, _NORM_FLOOR = 0.01, 0.1  # smallest deviation, as a part of the median


@dataclass(frozen=True)
class Limits:
    """The largest loss (nats) and gradient norm that are not bad; NaN is above every limit."""

    loss: float = LARGEST
    grad_norm: float = LARGEST


@dataclass
class Recent:
    """Loss and gradient norm of the last good steps, and how many bad ones followed; part of a run's state."""

    steps: list[int] = field(default_factory=list)  # rising
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    skipped: int = 0  # bad steps in a row
    overflows: int = 0  # float16: gradients too large for the scale, in a row
    rollbacks: int = 0  # of the run so far

    def add(self, step: int, loss: float, grad_norm: float, window: int) -> None:
        """Take the figures of a good step and forget what no limit will need."""
        self.skipped = self.overflows = 0
        self.steps.append(step)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        if len(self.steps) > window + LAG:
            del self.steps[0], self.loss[0], self.grad_norm[0]

    def _known(self, step: int, config: GuardConfig, since: int) -> slice:
        """Where the figures lie that a step is compared with."""
        known = sum(seen <= step - LAG for seen in self.steps)
        return slice(max(0, known - config.window, sum(seen < since for seen in self.steps)), known)

    def limits(self, step: int, config: GuardConfig, since: int = 0) -> Limits:
        """The limits of a step, counted from 1, by steps from `since` on: those before were of another kind."""
        known = self._known(step, config, since)
        loss, norm = self.loss[known], self.grad_norm[known]
        return Limits(_limit(loss, config.loss_z, _LOSS_FLOOR, config), _limit(norm, config.grad_norm_z, _NORM_FLOOR, config))

    def reason(self, step: int, loss: float, grad_norm: float, config: GuardConfig, since: int = 0) -> str:
        """Why a step is bad, in words with numbers; empty when it is not."""
        limits, known = self.limits(step, config, since), self._known(step, config, since)
        found = []
        for name, value, limit, values, z in (
            ("loss", loss, limits.loss, self.loss, config.loss_z),
            ("gradient norm", grad_norm, limits.grad_norm, self.grad_norm, config.grad_norm_z),
        ):
            if not math.isfinite(value):
                found.append(f"the {name} is {'NaN' if math.isnan(value) else 'infinite'}")
            elif value > limit:
                middle = statistics.median(values[known])
                score = z * (value - middle) / (limit - middle)
                found.append(
                    f"the {name} {value:.4g} is {score:.1f} deviations above {middle:.4g}, "
                    f"the median of {len(values[known])} recent steps (limit {z:g})"
                )
        return " and ".join(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values, not shared with this object."""
        return {
            "steps": list(self.steps),
            "loss": list(self.loss),
            "grad_norm": list(self.grad_norm),
            "skipped": self.skipped,
            "overflows": self.overflows,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def from_json(cls, values: Any, where: str) -> "Recent":
        """What `to_json` gave; none at all when there is nothing, as in checkpoints of earlier versions.

        Raises:
            UserError: naming `where`, if it is not what `to_json` gives.
        """
        if values is None:
            return cls()
        names = ("steps", "loss", "grad_norm")
        lists = [values.get(name) if isinstance(values, dict) else None for name in names]
        counts = [values.get(name) if isinstance(values, dict) else None for name in ("skipped", "overflows", "rollbacks")]
        sound = all(isinstance(numbers, list) and len(numbers) == len(lists[0] or []) <= 20_000 for numbers in lists)
        sound = sound and all(type(count) is int and count >= 0 for count in counts)
        sound = sound and all(type(step) is int for step in lists[0] or [])
        sound = sound and all(type(x) in (int, float) and abs(x) < 1e300 for numbers in lists[1:] for x in numbers or [])
        if not sound:
            raise UserError(f"{where}: guard is not what a run writes there: the checkpoint is damaged, take another one")
        return cls(*(list(numbers or []) for numbers in lists), *counts)  # type: ignore[arg-type]


def _limit(values: list[float], z: float, floor: float, config: GuardConfig) -> float:
    if not z or len(values) < config.window // 2:
        return LARGEST
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return middle + z * max(_SCALE * spread, floor * abs(middle))
