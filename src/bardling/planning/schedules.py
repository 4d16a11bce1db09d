"""Learning rate, batch size and context length as pure functions of the step, so there is no scheduler state to save.

Steps count from 0, the first update. After a linear warmup the learning rate follows one of four schedules down to `final_lr`,
which it reaches at step `decay_steps` (or `steps`) and keeps afterwards; `constant` stays at `lr`.

Batch and context may start small and double up to their full size (batch: McCandlish et al. 2018, arXiv:1812.06162, and Smith
et al. 2018, arXiv:1711.00489; context: Li et al. 2022, arXiv:2108.06084). A `Ramp` determines the stages; the number of samples
before a step follows from it, so the data order stays a function of the sample number.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from bardling.config import OptimConfig, TrainConfig


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Return the learning rate of update `step`.

    Warmup (step < w): lr (step + 1) / (w + 1), so the first update has a nonzero rate and update w is the first with the full
    rate. Decay, with progress p from 0 to 1: final_lr + (lr - final_lr) f(p), where f is (1 + cos(pi p)) / 2 for cosine
    (Loshchilov and Hutter 2017, arXiv:1608.03983) and 1 - p for linear and wsd (Hu et al. 2024, arXiv:2404.06395).

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
    # start < step < end here, so the denominator is never 0.
    progress = (step - start) / (end - start)
    remaining = (1.0 + math.cos(math.pi * progress)) / 2.0 if config.schedule == "cosine" else 1.0 - progress
    return config.final_lr + (config.lr - config.final_lr) * remaining


def followed_schedule(optim: OptimConfig, train: TrainConfig, *, shorten: bool = True) -> OptimConfig:
    """The schedule that a run follows: with a deadline, the decay ends with the run; with `shorten`, a warmup that would leave
    no step for the decay, as in a short trial of a recipe, leaves one."""
    if train.deadline is not None:
        return replace(optim, decay_steps=None)
    if not shorten or optim.schedule == "constant" or optim.decay_steps is not None:
        return optim
    return replace(optim, warmup_steps=min(optim.warmup_steps, train.steps - 1))


@dataclass(frozen=True)
class Ramp:
    """A size that doubles `doublings` times, in stages of equal length, over the first `fraction` of a run's steps."""

    doublings: int = 0
    fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.doublings < 0 or not 0 <= self.fraction <= 1:
            raise ValueError(f"{self}: doublings must be at least 0 and fraction between 0 and 1")

    def start(self, stage: int, steps: int) -> int:
        """First step of a stage: stage 0 starts the run, stage `doublings` has the full size."""
        # Round first: the error of a computed fraction, such as 50 / 300, must not shift a stage by a step.
        return 0 if stage == 0 else math.ceil(round(steps * self.fraction * stage / self.doublings, 6))

    def size_at(self, step: int, steps: int, full_size: int) -> int:
        """Size in update `step` of `steps`, from full_size / 2**doublings at the start to `full_size` at the end.

        A context of t tokens reads a batch [B, T] as [B * T / t, t]: the same tokens in the same order.

        Raises:
            ValueError: `full_size` is not a multiple of 2**doublings.
        """
        stage = sum(step >= self.start(number, steps) for number in range(1, self.doublings + 1))
        return self._smallest(full_size) << stage

    def total_before(self, step: int, steps: int, full_size: int) -> int:
        """Sum of the sizes of all updates before `step`; for a batch, this is the number of the first sample of `step`.

        Raises:
            ValueError: `full_size` is not a multiple of 2**doublings.
        """
        smallest = self._smallest(full_size)
        bounds = [min(self.start(stage, steps), step) for stage in range(self.doublings + 1)] + [step]
        return sum((end - begin) * (smallest << stage) for stage, (begin, end) in enumerate(pairwise(bounds)))

    def _smallest(self, full_size: int) -> int:
        if full_size % (1 << self.doublings):
            raise ValueError(f"{full_size} cannot be halved {self.doublings} times: choose a multiple of {1 << self.doublings}")
        return full_size >> self.doublings
