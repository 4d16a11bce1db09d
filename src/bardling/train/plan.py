"""All batch arithmetic, in one place: how many sequences each process reads in each forward pass of each step.

The samples of a step are numbered from its first one; forward pass `m` of process `r` takes the `micro_batch` samples
that start at `(m * world_size + r) * micro_batch`. Every split over processes and passes thus covers the same samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bardling.config import TrainConfig
from bardling.errors import UserError


@dataclass
class Horizon:
    """The run's last step. A deadline moves it while the run goes on (`train/deadline.py`); all who ask see the same."""

    steps: int


@dataclass(frozen=True)
class TrainPlan:
    """How a run is cut into steps and forward passes."""

    horizon: Horizon
    accumulation: int  # forward passes of one process in a step
    micro_batch: int  # sequences in a forward pass
    samples_per_step: int  # sequences in a step, over all processes
    tokens_per_step: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps of the run, as planned now."""
        return self.horizon.steps

    def requests(self, first_sample: int, steps: int, rank: int) -> Iterator[tuple[int, int]]:
        """Yield (first sample, size) of each forward pass of process `rank`, for `steps` steps from `first_sample` on."""
        for step in range(steps):
            start = first_sample + step * self.samples_per_step
            for micro in range(self.accumulation):
                yield start + (micro * self.world_size + rank) * self.micro_batch, self.micro_batch


def make_plan(config: TrainConfig, block_size: int, world_size: int) -> TrainPlan:
    """Divide a step's sequences over processes and forward passes.

    Raises:
        UserError: the batch does not divide evenly; the message names sizes that do.
    """
    batch = config.batch_size
    if batch % world_size:
        lower, upper = batch // world_size * world_size, -(-batch // world_size) * world_size
        raise UserError(
            f"train.batch_size = {batch} does not divide among {world_size} processes: "
            f"use {' or '.join(str(size) for size in (lower, upper) if size)}"
        )
    share = batch // world_size
    # 'auto' is decided on the device (train/memory.py); until then the plan is the one that needs least time.
    micro = config.micro_batch if isinstance(config.micro_batch, int) else share
    if share % micro:
        fitting = max(size for size in range(1, micro + 1) if share % size == 0)
        raise UserError(
            f"train.micro_batch = {micro} does not divide the {share} sequences that a process has in a step "
            f"(train.batch_size = {batch} over {world_size} processes): use --train.micro_batch {fitting}"
        )
    return TrainPlan(
        horizon=Horizon(config.steps),
        accumulation=share // micro,
        micro_batch=micro,
        samples_per_step=batch,
        tokens_per_step=batch * block_size,
        world_size=world_size,
    )
