"""The learning rate as a pure function of the step, so that there is no scheduler whose state could be lost.

Step counts from 0, the first update. After a linear warm-up the rate follows one of four shapes down to `final_lr`, which it
reaches at step `decay_steps` (or `steps`) and keeps from there on; `constant` stays at `lr`.
"""

import math

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
