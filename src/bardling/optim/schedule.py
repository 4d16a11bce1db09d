"""Learning rate, batch and context as pure functions of the step, so that there is no scheduler whose state could be lost.

Step counts from 0, the first update. After a linear warm-up the rate follows one of four shapes down to `final_lr`, which it
reaches at step `decay_steps` (or `steps`) and keeps from there on; `constant` stays at `lr`.

Batch and context may start small and double until they are whole (batch: McCandlish et al. 2018, arXiv:1812.06162, and Smith et
al. 2018, arXiv:1711.00489; context: Li et al. 2022, arXiv:2108.06084). A `Ramp` says how often and until when; the samples
before a step follow from it by arithmetic, which keeps the order of the data a function of the sample's number.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from bardling.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Return the learning rate of update `step`.

    Warm-up (step < w): lr (step + 1) / (w + 1), so that the first update moves and update w is the first at the full rate.
    Decay, with progress p from 0 at its start to 1 at its end: final_lr + (lr - final_lr) f(p), where f is (1 + cos(pi p)) / 2
    for cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) and 1 - p for linear and wsd (Hu et al. 2024, arXiv:2404.06395).

    Args:
        step: number of the update, from 0.
        steps: length of the run (updates); the end of the decay unless `config.decay_steps` is set.
    """
    end = steps if config.decay_steps is None else config.decay_steps
    if config.schedule != "constant" and step >= end:
        return config.final_lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    start = float(config.warmup_steps)
    if config.schedule == "wsd":
        start = max(start, end - config.decay_fraction * end)
    if step <= start:
        return config.lr
    # Here start < step < end, so the division is safe whatever the settings.
    progress = (step - start) / (end - start)
    left = (1.0 + math.cos(math.pi * progress)) / 2.0 if config.schedule == "cosine" else 1.0 - progress
    return config.final_lr + (config.lr - config.final_lr) * left


@dataclass(frozen=True)
class Ramp:
    """A size that doubles `doublings` times, in stages of equal length, over the first `part` of a run's steps."""

    doublings: int = 0
    part: float = 0.0

    def __post_init__(self) -> None:
        if self.doublings < 0 or not 0 <= self.part <= 1:
            raise ValueError(f"{self}: doublings must be at least 0, part from 0 to 1")

    def start(self, stage: int, steps: int) -> int:
        """First step of a stage: stage 0 begins the run, stage `doublings` has the whole size."""
        # Rounded first: a part that was worked out, such as 50 / 300, must not move a stage by a step.
        return 0 if stage == 0 else math.ceil(round(steps * self.part * stage / self.doublings, 6))

    def divisor(self, step: int, steps: int) -> int:
        """What the whole size is divided by at update `step` of a run of `steps`: 2**doublings at first, 1 in the end."""
        stage = sum(step >= self.start(number, steps) for number in range(1, self.doublings + 1))
        return 1 << (self.doublings - stage)


def batch_size_at(step: int, steps: int, batch_size: int, ramp: Ramp) -> int:
    """Sequences of update `step`; `batch_size` must be divisible by 2**doublings.

    Raises:
        ValueError: it is not.
    """
    return _divided(batch_size, ramp) // ramp.divisor(step, steps)


def samples_before(step: int, steps: int, batch_size: int, ramp: Ramp) -> int:
    """Sequences that all updates before `step` have read: the number of its first sample.

    Raises:
        ValueError: as `batch_size_at`.
    """
    least = _divided(batch_size, ramp) >> ramp.doublings
    bounds = [min(ramp.start(stage, steps), step) for stage in range(ramp.doublings + 1)] + [step]
    return sum((after - before) * (least << stage) for stage, (before, after) in enumerate(pairwise(bounds)))


def block_size_at(step: int, steps: int, block_size: int, ramp: Ramp) -> int:
    """Context (tokens) of update `step`. A batch [B, T] is then read as [B * T / t, t]: the same tokens in the same order.

    Raises:
        ValueError: `block_size` is not divisible by 2**doublings.
    """
    return _divided(block_size, ramp) // ramp.divisor(step, steps)


def _divided(whole: int, ramp: Ramp) -> int:
    if whole % (1 << ramp.doublings):
        raise ValueError(f"{whole} cannot be halved {ramp.doublings} times: choose a multiple of {1 << ramp.doublings}")
    return whole
