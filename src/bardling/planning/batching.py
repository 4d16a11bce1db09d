"""All batch arithmetic in one place: which sequences each process reads in each forward pass of each step.

The samples of a step are numbered from its first one; forward pass `m` of process `r` takes the `micro_batch` samples that
start at `(m * data_size + r) * micro_batch`. Every split over processes and passes thus covers the same samples.

If batch or context grow (`train.batch_start`, `train.context_start`), the run has several stages, each with steps of one shape.
A sample is always `block_size` tokens; a stage with a shorter context cuts it into sequences of that length, which keeps the
tokens and their order. Stages are fractions of the run's steps, so a run with a deadline, which plans its steps as it goes, has
a single stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bardling.config import TrainConfig
from bardling.errors import UserError
from bardling.planning.schedules import Ramp


@dataclass
class Horizon:
    """The run's last step. A deadline changes it during the run (`training/recovery/deadline.py`)."""

    steps: int


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of one shape."""

    first_step: int  # counted from 0
    accumulation: int  # forward passes per step and process
    micro_batch: int  # samples per forward pass
    samples: int  # per step, over all processes
    context: int  # length of the sequences that samples are cut into (tokens)


@dataclass(frozen=True)
class TrainPlan:
    """How a run is divided into steps and forward passes. Properties without a step argument describe the last stage."""

    horizon: Horizon
    stages: tuple[Stage, ...]  # at least one; the first starts at step 0
    block_size: int  # tokens per sample
    data_size: int

    @property
    def steps(self) -> int:
        """Steps of the run, as currently planned."""
        return self.horizon.steps

    @property
    def accumulation(self) -> int:
        return self.stages[-1].accumulation

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass; no stage has more."""
        return self.stages[-1].micro_batch

    @property
    def samples_per_step(self) -> int:
        """Sequences per step, over all processes."""
        return self.stages[-1].samples

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, over all processes."""
        return self.samples_per_step * self.block_size

    @property
    def shapes(self) -> int:
        """Number of distinct shapes of a forward pass."""
        return len({(stage.micro_batch, stage.context) for stage in self.stages})

    def at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        return next(stage for stage in reversed(self.stages) if step >= stage.first_step)

    def spans(self, begin: int, end: int) -> Iterator[tuple[Stage, int]]:
        """Yield each stage that has steps in [begin, end), with their number."""
        stage_ends = [stage.first_step for stage in self.stages[1:]] + [end]
        for stage, stage_end in zip(self.stages, stage_ends, strict=True):
            count = min(stage_end, end) - max(stage.first_step, begin)
            if count > 0:
                yield stage, count

    def samples_before(self, step: int) -> int:
        """Samples read before `step`, which is also the number of its first sample."""
        return sum(count * stage.samples for stage, count in self.spans(0, step))

    def tokens_before(self, step: int) -> int:
        return self.samples_before(step) * self.block_size

    def cost(self, per_token: Callable[[int], int], begin: int = 0, end: int | None = None) -> int:
        """Total cost of the steps in [begin, end).

        Args:
            per_token: cost of a token, such as FLOPs, at a given context length.
            end: None for the end of the run.
        """
        spans = self.spans(begin, self.steps if end is None else end)
        return sum(count * stage.samples * self.block_size * per_token(stage.context) for stage, count in spans)

    def context_start_step(self, step: int) -> int:
        """First step with the same context length as `step`, counted from 0."""
        context = self.at(step).context
        return next(stage.first_step for stage in self.stages if stage.context == context)

    def describe_stages(self) -> str:
        """The stages as text, such as '8 x 256 from step 1, 16 x 256 from step 501'."""
        return ", ".join(
            f"{stage.samples * self.block_size // stage.context} x {stage.context} from step {stage.first_step + 1:,}"
            for stage, _ in self.spans(0, self.steps)
        )

    def requests(self, first_sample: int, steps: int, rank: int, first_step: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (first sample, size) of each forward pass of process `rank`, for `steps` steps from `first_step` on.

        Args:
            first_sample: number of the first sample of `first_step`.
        """
        for step in range(first_step, first_step + steps):
            stage = self.at(step)
            for micro in range(stage.accumulation):
                yield first_sample + (micro * self.data_size + rank) * stage.micro_batch, stage.micro_batch
            first_sample += stage.samples


def make_plan(config: TrainConfig, block_size: int, data_size: int) -> TrainPlan:
    """Divide the sequences of each stage's steps over processes and forward passes.

    Raises:
        UserError: a batch does not divide evenly, or batch or context cannot reach their full size by doubling; the message
            names valid sizes.
    """
    batch = Ramp(config.batch_doublings, config.ramp)
    context = Ramp(config.context_doublings(block_size), config.ramp)
    for key, size in (("train.batch_size", config.batch_size), ("train.batch_start", config.batch_size >> batch.doublings)):
        if size % data_size:
            raise _indivisible(key, size, config.batch_size, data_size)
    per_process = config.batch_size // data_size
    # 'auto' is resolved on the device (training/recovery/memory.py); until then plan the fastest option, a single pass.
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else per_process
    if per_process % micro_batch and data_size == 1:  # several processes use the nearest divisor below, as each stage does
        remedy = f"use --train.micro_batch {_largest_divisor(per_process, micro_batch)}"
        raise UserError(f"train.micro_batch = {micro_batch} does not divide train.batch_size = {config.batch_size}: {remedy}")
    first_steps = {ramp.start(stage, config.steps) for ramp in (batch, context) for stage in range(ramp.doublings + 1)}
    stages = []
    for first_step in sorted(first_steps):
        samples = batch.size_at(first_step, config.steps, config.batch_size)
        size = _largest_divisor(samples // data_size, micro_batch)
        stages.append(
            Stage(
                first_step=first_step,
                accumulation=samples // data_size // size,
                micro_batch=size,
                samples=samples,
                context=context.size_at(first_step, config.steps, block_size),
            )
        )
    return TrainPlan(horizon=Horizon(config.steps), stages=tuple(stages), block_size=block_size, data_size=data_size)


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _indivisible(key: str, size: int, full_size: int, data_size: int) -> UserError:
    if key == "train.batch_start":
        # `full_size` itself divides evenly, or the error would be about train.batch_size.
        valid = [full_size >> times for times in range(full_size.bit_length()) if not full_size % (data_size << times)][-1:]
    else:
        valid = [near for near in (size // data_size * data_size, -(-size // data_size) * data_size) if near]
    remedy = " or ".join(str(number) for number in valid)
    return UserError(f"{key} = {size} does not divide among {data_size} processes: use {remedy}")
