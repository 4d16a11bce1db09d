from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import doublings, duration_seconds, require, require_at_least
from bardling.extensions import HOOKS, OBJECTIVES


@dataclass(frozen=True)
class TrainConfig:
    """Training length and batch sizes."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences per optimizer step, over all processes."""
    batch_start: int | None = None
    """Sequences per step at the start; doubles in equal stages up to batch_size; unset: batch_size throughout."""
    context_start: int | None = None
    """Context at the start (tokens); doubles in stages up to block_size at equal tokens per step; unset: model.block_size."""
    ramp: float = 0.5
    """Fraction of the steps over which batch size and context grow."""
    micro_batch: int | Literal["auto"] | None = None
    """Sequences per forward pass of each process; 'auto': a size that fits in memory; unset: no gradient accumulation."""
    recompute: Literal["none", "blocks"] = "none"
    """Activation checkpointing: 'blocks' recomputes blocks in the backward pass; less memory, about 25% more time."""
    grad_clip: float = 1.0
    """Maximum gradient norm (0 disables clipping)."""
    objective: str = "next_token"
    """Training objective: 'next_token', or the name of an installed extension."""
    hooks: tuple[str, ...] = ()
    """Installed extension hooks to call after every step."""
    log_every: int = 10
    """Steps between log lines."""
    deadline: int | str | None = None
    """Total time of the run: 8h, 1h30m, 90s or seconds; steps and decay are planned to end then; unset: no deadline."""
    rank_timeout: float = 120.0
    """Seconds without a heartbeat or progress after which a process counts as lost and the job ends (0 disables this)."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "train", "steps", "batch_size", "log_every")
        require_at_least(0, self, "train", "rank_timeout", "grad_clip")
        require(self.batch_size <= 10**7, "train.batch_size", self.batch_size, "must be at most 10000000 sequences")
        require(0 < self.ramp <= 1, "train.ramp", self.ramp, "must be above 0 and at most 1")
        OBJECTIVES.check("train.objective", self.objective)
        for hook in self.hooks:
            HOOKS.check("train.hooks", hook)
        valid = isinstance(self.micro_batch, str) or self.micro_batch is None or self.micro_batch >= 1
        require(valid, "train.micro_batch", self.micro_batch, "must be at least 1, or 'auto'")
        seconds = self.deadline_seconds
        require(seconds is None or seconds >= 1, "train.deadline", self.deadline, "must be at least one second")

    @property
    def batch_doublings(self) -> int:
        """How many times the batch doubles; UserError if doubling `batch_start` never gives `batch_size`."""
        return doublings(self.batch_start, self.batch_size, "train.batch_start", "train.batch_size")

    def context_doublings(self, block_size: int) -> int:
        """How many times the context doubles; UserError if doubling `context_start` never gives `block_size`."""
        return doublings(self.context_start, block_size, "train.context_start", "model.block_size")

    @property
    def deadline_seconds(self) -> float | None:
        """`deadline` in seconds; None without one."""
        if self.deadline is None or isinstance(self.deadline, int):
            return self.deadline
        return duration_seconds(self.deadline, "train.deadline")
