"""All batch arithmetic, in one place: how many sequences each process reads in each forward pass of each step.

The samples of a step are numbered from its first one; forward pass `m` of process `r` takes the `micro_batch` samples
that start at `(m * world_size + r) * micro_batch`. Every split over processes and passes thus covers the same samples.

Where batch or context grow (`train.batch_start`, `train.context_start`), the run has several stages, each with steps of one
shape. A sample is always `block_size` tokens; in a stage of a shorter context it is cut into sequences of that length, with the
same tokens in the same order. Stages are parts of the run's steps, so a run with a deadline, which plans its steps as it goes,
has a single one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bardling.config import TrainConfig
from bardling.errors import UserError
from bardling.optim.schedule import Ramp, batch_size_at, block_size_at


@dataclass
class Horizon:
    """The run's last step. A deadline moves it while the run goes on (`train/deadline.py`); all who ask see the same."""

    steps: int


@dataclass(frozen=True)
class Stage:
    """Steps of one shape, up to the next stage or the end."""

    first_step: int  # counted from 0
    accumulation: int  # forward passes of one process in a step
    micro_batch: int  # samples in a forward pass
    samples: int  # in a step, over all processes
    context: int  # tokens of the sequences into which samples are cut


@dataclass(frozen=True)
class TrainPlan:
    """How a run is cut into steps and forward passes. What is said of a step without its number holds for the last stage."""

    horizon: Horizon
    stages: tuple[Stage, ...]  # at least one; the first begins the run
    block_size: int  # tokens in a sample
    world_size: int

    @property
    def steps(self) -> int:
        """Steps of the run, as planned now."""
        return self.horizon.steps

    @property
    def accumulation(self) -> int:
        """Forward passes of one process in a step."""
        return self.stages[-1].accumulation

    @property
    def micro_batch(self) -> int:
        """Sequences in a forward pass: the most of any stage."""
        return self.stages[-1].micro_batch

    @property
    def samples_per_step(self) -> int:
        """Sequences in a step, over all processes."""
        return self.stages[-1].samples

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step, over all processes."""
        return self.samples_per_step * self.block_size

    @property
    def shapes(self) -> int:
        """How many different shapes the batches of forward passes have."""
        return len({(stage.micro_batch, stage.context) for stage in self.stages})

    def at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        for stage in reversed(self.stages):
            if step >= stage.first_step:
                return stage
        raise ValueError(f"step {step}: the first one is 0")

    def spans(self, begin: int, end: int) -> Iterator[tuple[Stage, int]]:
        """Yield each stage with the number of its steps among `begin` to `end` - 1, where there are any."""
        ends = [stage.first_step for stage in self.stages[1:]] + [end]
        for stage, last in zip(self.stages, ends, strict=True):
            count = min(last, end) - max(stage.first_step, begin)
            if count > 0:
                yield stage, count

    def samples_before(self, step: int) -> int:
        """Samples that all steps before `step` read: the number of its first one."""
        return sum(count * stage.samples for stage, count in self.spans(0, step))

    def tokens_before(self, step: int) -> int:
        """Tokens that all steps before `step` read."""
        return self.samples_before(step) * self.block_size

    def cost(self, per_token: Callable[[int], int], begin: int = 0, end: int | None = None) -> int:
        """What steps `begin` to `end` - 1 (the last one, when absent) cost together.

        Args:
            per_token: cost of a token (FLOPs, say) in sequences of a given context.
        """
        spans = self.spans(begin, self.steps if end is None else end)
        return sum(count * stage.samples * self.block_size * per_token(stage.context) for stage, count in spans)

    def context_since(self, step: int) -> int:
        """The first step that has had the context of `step`, with all those between; counted from 0."""
        context = self.at(step).context
        return next(stage.first_step for stage in self.stages if stage.context == context)

    def in_words(self) -> str:
        """The stages, for a person."""
        return ", ".join(
            f"{stage.samples * self.block_size // stage.context} x {stage.context} from step {stage.first_step + 1:,}"
            for stage, _ in self.spans(0, self.steps)
        )

    def requests(self, first_sample: int, steps: int, rank: int, first_step: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (first sample, size) of each forward pass of process `rank`, for `steps` steps from `first_step` on.

        Args:
            first_sample: of `first_step`.
        """
        for step in range(first_step, first_step + steps):
            stage = self.at(step)
            for micro in range(stage.accumulation):
                yield first_sample + (micro * self.world_size + rank) * stage.micro_batch, stage.micro_batch
            first_sample += stage.samples


def make_plan(config: TrainConfig, block_size: int, world_size: int) -> TrainPlan:
    """Divide the sequences of each stage's steps over processes and forward passes.

    Raises:
        UserError: a batch does not divide evenly, or batch or context do not double up to the whole; the message names sizes
            that do.
    """
    batch = Ramp(config.batch_doublings, config.ramp)
    context = Ramp(config.context_doublings(block_size), config.ramp)
    for key, size in (("train.batch_size", config.batch_size), ("train.batch_start", config.batch_size >> batch.doublings)):
        if size % world_size:
            raise _indivisible(key, size, config.batch_size, world_size)
    share = config.batch_size // world_size
    # 'auto' is decided on the device (train/memory.py); until then the plan is the one that needs least time.
    micro = config.micro_batch if isinstance(config.micro_batch, int) else share
    if share % micro:
        raise UserError(
            f"train.micro_batch = {micro} does not divide the {share} sequences that a process has in a step "
            f"(train.batch_size = {config.batch_size} over {world_size} processes): use --train.micro_batch "
            f"{_largest_divisor(share, micro)}"
        )
    begins = {ramp.start(stage, config.steps) for ramp in (batch, context) for stage in range(ramp.doublings + 1)}
    stages = []
    for first in sorted(begins):
        samples = batch_size_at(first, config.steps, config.batch_size, batch)
        passes = _largest_divisor(samples // world_size, micro)
        stages.append(
            Stage(
                first_step=first,
                accumulation=samples // world_size // passes,
                micro_batch=passes,
                samples=samples,
                context=block_size_at(first, config.steps, block_size, context),
            )
        )
    return TrainPlan(horizon=Horizon(config.steps), stages=tuple(stages), block_size=block_size, world_size=world_size)


def _largest_divisor(share: int, most: int) -> int:
    return next(size for size in range(min(share, most), 0, -1) if share % size == 0)


def _indivisible(key: str, size: int, whole: int, world_size: int) -> UserError:
    """The error of a batch that does not divide among processes."""
    if key == "train.batch_start":
        halves = [whole >> times for times in range(whole.bit_length()) if not whole % (world_size << times)]
        fitting = [halves[-1]]  # batch_size itself divides, or the complaint would be about it
    else:
        fitting = [near for near in (size // world_size * world_size, -(-size // world_size) * world_size) if near]
    remedy = " or ".join(str(number) for number in fitting)
    return UserError(f"{key} = {size} does not divide among {world_size} processes: use {remedy}")
