from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import require, require_at_least


@dataclass(frozen=True)
class GuardConfig:
    """How a run responds to bad steps: those whose loss or gradient is NaN, infinite, or far above recent values."""

    policy: Literal["skip", "rollback", "stop", "off"] = "skip"
    """Bad step: 'skip' its update, 'rollback' to the last checkpoint and skip its sequences, 'stop' the run; 'off': ignore."""
    loss_z: float = 10.0
    """Deviations above the recent median at which a loss counts as a spike; 0 detects only NaN and infinite losses."""
    grad_norm_z: float = 100.0
    """The same for the gradient norm, which spikes higher in healthy runs; clipping limits the effect of such spikes."""
    window: int = 100
    """Recent steps used for the median and deviation; spike detection starts after half as many steps."""
    max_skips: int = 10
    """Consecutive bad steps after which the run ends, or, if loss and gradient are finite, they count as the new normal."""
    max_rollbacks: int = 5
    """Rollbacks per run; the next bad step ends it."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "guard", "loss_z", "grad_norm_z", "max_rollbacks")
        require_at_least(1, self, "guard", "max_skips")
        require(8 <= self.window <= 10_000, "guard.window", self.window, "must be between 8 and 10000")
