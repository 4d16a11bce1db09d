"""Training speed of a recipe on this machine: the training loop itself, timed over a few steps.

Method: the recipe is resolved as for a run and trained by `training.loop.fit`. Warm-up steps come first (the first one includes
compilation and memory allocation), then steps that are timed as a whole, without synchronisation within them; then a few that
synchronise around forward pass and optimizer, to time the parts; then, on request, a few under PyTorch's profiler. Peak speed
is measured with one large matmul at the same time, because a vendor spec assumes clocks that a shared or power-limited device
never reaches.

Limits: one process. The parts are measured in separate steps, whose synchronisation takes time, so they need not add up to the
step time. FLOPs are those of `planning/costs.py`: matmuls, with the full square of attention.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, ModelConfig, RunConfig
from bardling.data.batches.assemble import data_order
from bardling.data.batches.loader import Batch, BatchSource, Prefetcher, TrainSequences
from bardling.data.batches.packing import document_start
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context, distributed
from bardling.distributed.device import (
    DTYPES,
    Precision,
    backend,
    device_name,
    matmul_flops,
    memory_used,
    synchronize,
)
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.planning.batching import Horizon, TrainPlan
from bardling.planning.costs import flops_per_token, parameters
from bardling.planning.depth import apply_depth
from bardling.planning.plan import resolve_vocabulary
from bardling.planning.schedules import learning_rate
from bardling.training.build import Assembly, build
from bardling.training.compile_choice import AS_CONFIGURED
from bardling.training.facts import Facts
from bardling.training.loop import fit
from bardling.training.objective import build_objective
from bardling.training.recovery.spikes import require_gradient
from bardling.training.resolve import ResolvedRun, resolve
from bardling.training.state import TrainState
from bardling.training.step import StepResult, StepSettings

MAX_PARTS_STEPS = 5  # to measure the parts of a step
PROFILED_STEPS = 3
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # large enough to make launch overhead negligible


@dataclass(frozen=True)
class Operator:
    name: str
    calls: float  # per step
    seconds: float  # per step, excluding the operators that it calls


@dataclass(frozen=True)
class BenchResult:
    """Results of a measurement. Times are in seconds, speeds in FLOP/s, memory in bytes."""

    device: str
    precision: Precision
    compiled: bool
    compile_why: str
    model: ModelConfig
    parameters: int  # without vocabulary padding
    plan: TrainPlan
    first_step_seconds: float  # including compilation and set-up
    step_seconds: tuple[float, ...]  # of each measured step, in order
    parts: dict[str, float]  # of a step: data (waiting for the batches), forward, backward (including clipping), optimizer
    memory_bytes: int | None  # peak; of the whole process on a CPU; None where the system does not tell
    flops_per_token: int
    peak_flops: float | None  # vendor spec; None if unknown for this device
    matmul_flops: float  # measured
    notes: tuple[str, ...] = ()
    operators: tuple[Operator, ...] = ()  # most expensive first
    trace: Path | None = None

    @property
    def median_seconds(self) -> float:
        """Step time: the median, which outliers do not move."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.plan.tokens_per_step / self.median_seconds

    @property
    def flops_per_second(self) -> float:
        return self.flops_per_token * self.tokens_per_second

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: achieved fraction of the vendor's peak (PaLM, arXiv:2204.02311, appendix B); None if the
        peak is unknown, or wrong because the model exceeds it."""
        mfu = None if self.peak_flops is None else self.flops_per_second / self.peak_flops
        return None if mfu is None or mfu > 1 else mfu

    @property
    def mfu_of_matmul(self) -> float | None:
        """Achieved fraction of the measured matmul speed; None if the model exceeds it, as on a busy machine."""
        mfu = self.flops_per_second / self.matmul_flops
        return None if mfu > 1 else mfu


def bench(
    config: RunConfig,
    *,
    steps: int = 20,
    warmup: int = 5,
    data: Literal["random", "real"] = "random",
    profile: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchResult:
    """Train for a few steps and measure them. Nothing but the trace is saved.

    Args:
        config: the recipe; `auto` is resolved as in a run.
        steps: steps to time.
        warmup: untimed steps before these.
        data: random tokens, or the recipe's data (prepared first if necessary).
        profile: folder for a trace that chrome://tracing, Perfetto and TensorBoard can open.
        progress: called with (steps done, total steps).

    Raises:
        UserError: an option or the recipe is invalid, or memory runs out.
    """
    for name, value in {"steps": steps, "warmup": warmup}.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if profile is not None:  # now, rather than fail after the measurement
        with os_error_as_user_error(profile, "create this folder for --profile", remedy=": name another folder"):
            profile.mkdir(parents=True, exist_ok=True)
    with (
        distributed(config.device) as context,
        backend(context.device, deterministic=config.deterministic, attention=config.attention),
    ):
        if context.world_size > 1:
            raise UserError("bardling bench measures one process: start it without torchrun (a run logs the speed of several)")
        run, source, notes = _prepare(config, context, data)
        try:
            return _Bench(run, source, context, steps, warmup, profile, progress).measure(notes)
        except torch.OutOfMemoryError:
            micro = run.plan.micro_batch
            raise UserError(
                f"train.micro_batch = {micro}: does not fit into the memory of {device_name(context.device)}: "
                f"try --train.micro_batch {max(micro // 2, 1)}"
            ) from None


class RandomSequences:
    """Random tokens instead of a dataset's sequences, as a function of the sample number."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab_size, self._block_size = vocab_size, block_size

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs, and the same shifted by one."""
        random = np.random.default_rng(first_sample)
        tokens = torch.from_numpy(random.integers(0, self._vocab_size, (size, self._block_size + 1)))  # [B, T + 1]
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


@dataclass
class _Bench:
    run: ResolvedRun
    source: BatchSource
    context: Context
    steps: int
    warmup: int
    profile: Path | None
    progress: Callable[[int, int], None]

    def __post_init__(self) -> None:
        run, self.device, self.parts = self.run, self.context.device, min(self.steps, MAX_PARTS_STEPS)
        self.total = self.warmup + self.steps + self.parts + (PROFILED_STEPS if self.profile else 0)
        # Measure the last stage of a growing batch, from the first step on.
        self.plan = dataclasses.replace(run.plan, stages=(dataclasses.replace(run.plan.stages[-1], first_step=0),))
        precision, clip, keep = run.execution.precision, run.config.train.grad_clip, run.config.cuda_graphs
        objective = build_objective(run.config.train, run.tokenizer, self.device)
        self.settings = StepSettings(objective, precision, self.context, grad_clip=clip, keep_gradients=keep)
        size = MATMUL_SIZE.get(self.device.type, 1024)
        self.matmul = matmul_flops(self.device, DTYPES[precision.name], size=size, seconds=0.3)

    def measure(self, notes: list[str]) -> BenchResult:
        run, device = self.run, self.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        assembly = build(
            run.config.model, run.config.optim, run.execution, self.context, seed=run.config.seed, tune=run.config.tune
        )
        with Prefetcher(self.source, self.plan.requests(0, self.total, 0), device) as batches:
            first = self._train(assembly, batches, self.warmup)[0]
            seconds = self._train(assembly, batches, self.steps)
            parts = self._parts(assembly, batches)
            memory = memory_used(device)
            operators, trace = self._profile(assembly, batches, self.profile) if self.profile else ((), None)
        why = run.why("compile")
        return BenchResult(
            device=device_name(device),
            precision=run.execution.precision,
            compiled=run.execution.compiled,
            compile_why=why if why == AS_CONFIGURED else f"auto: {why}, in a run of {run.plan.steps:,} steps",
            model=run.config.model,
            parameters=parameters(run.config.model),
            plan=self.plan,
            first_step_seconds=first,
            step_seconds=tuple(seconds),
            parts=parts,
            memory_bytes=memory,
            flops_per_token=flops_per_token(run.config.model, tune=run.config.tune),
            peak_flops=None if device.type == "cpu" else run.peak_flops,
            matmul_flops=self.matmul,
            notes=tuple(notes),
            operators=operators,
            trace=trace,
        )

    def _train(self, assembly: Assembly, batches: Iterator[Batch], steps: int) -> list[float]:
        """Train for `steps` more steps as a run does; returns the seconds of each."""
        timestamps, latest = [], None

        def hook(state: TrainState, result: StepResult | None) -> None:
            nonlocal latest
            timestamps.append(_timestamp(self.device))
            if result is not None:
                latest = result
                self.progress(state.step, self.total)

        config = self.run.config
        plan = dataclasses.replace(self.plan, horizon=Horizon(assembly.state.step + steps))
        lr_at = partial(learning_rate, config=config.optim, steps=self.run.plan.steps)
        fit(assembly, batches, plan, self.settings, lr_at=lr_at, seed=config.seed, hooks=[hook])
        synchronize(self.device)
        if latest is not None:
            require_gradient(assembly.state.step, float(latest.loss), float(latest.grad_norm))
        cuda, pairs = self.device.type == "cuda", itertools.pairwise(timestamps)
        return [before.elapsed_time(after) / 1e3 if cuda else after - before for before, after in pairs]

    def _parts(self, assembly: Assembly, batches: Iterator[Batch]) -> dict[str, float]:
        """Seconds of the parts of a step, synchronising with the device around each."""
        spent = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

        def now() -> float:
            synchronize(self.device)
            return time.perf_counter()

        def timed_batches() -> Iterator[Batch]:
            while True:
                start = now()
                batch = next(batches)
                spent["data"] += now() - start
                yield batch

        def timed_forward(*arguments: Any, **options: Any) -> torch.Tensor:
            start = now()
            loss = assembly.forward(*arguments, **options)
            spent["forward"] += now() - start
            return loss

        def before_update(*_: object) -> None:
            spent["optimizer"] -= now()

        def after_update(*_: object) -> None:
            spent["optimizer"] += now()

        optimizer, timed = assembly.state.optimizer, Assembly(assembly.state, timed_forward)
        hooks = [optimizer.register_step_pre_hook(before_update), optimizer.register_step_post_hook(after_update)]
        total = sum(self._train(timed, timed_batches(), self.parts))
        for hook in hooks:
            hook.remove()
        spent["backward"] = max(total - sum(spent.values()), 0.0)
        return {name: seconds / self.parts for name, seconds in spent.items()}

    def _profile(self, assembly: Assembly, batches: Iterator[Batch], folder: Path) -> tuple[tuple[Operator, ...], Path]:
        """Run some steps under the profiler; write the trace and sum up its operators."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as record:
            self._train(assembly, batches, PROFILED_STEPS)
            synchronize(self.device)
        # TensorBoard's profiler page looks for this suffix; the time keeps earlier traces.
        trace = folder / f"bardling-{time.time_ns() // 10**6}.pt.trace.json.gz"
        record.export_chrome_trace(str(trace))
        operators = [
            Operator(
                str(row.key),
                row.count / PROFILED_STEPS,
                (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6 / PROFILED_STEPS,
            )
            for row in record.key_averages()
        ]
        return tuple(sorted(operators, key=lambda row: -row.seconds)), trace


def _timestamp(device: torch.device) -> Any:
    """The time at which the work launched so far is done; the host does not wait for a GPU."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
    synchronize(device)
    return time.perf_counter()


@dataclass
class _RandomFacts(Facts):
    """The facts of this machine, with random tokens instead of a dataset."""

    vocab_size: int = 0

    def dataset(self, data: DataConfig, context: int = 0) -> TokenDataset:
        # The attributes that `resolve` uses.
        return cast(
            TokenDataset,
            SimpleNamespace(vocab_size=self.vocab_size, path="random tokens", tokenizer=None, manifest=SimpleNamespace(row=0)),
        )


def _prepare(config: RunConfig, context: Context, data: str) -> tuple[ResolvedRun, BatchSource, list[str]]:
    """The resolved recipe, the source of its batches, and notes for the user."""
    # Initial weights have no influence on speed.
    config = apply_depth(dataclasses.replace(config, model=dataclasses.replace(config.model, init="")))
    folder, notes = RunFolder(Path()), list[str]()
    if data == "random":
        model, notes = resolve_vocabulary(config)
        run = resolve(dataclasses.replace(config, model=model), _RandomFacts(context, folder, vocab_size=model.vocab_size))
        source: BatchSource = RandomSequences(model.vocab_size, model.block_size)
        if config.data.document_mask:
            notes.append(
                "data.document_mask has no effect, because random tokens have no documents; --data real uses the recipe's data"
            )
    else:
        facts = Facts(context, folder)
        run = resolve(config, facts)
        dataset = facts.dataset(run.config.data)
        split = dataset.split("train")
        order = data_order(dataset, run.config.data, config.seed, run.config.model.block_size)
        source = TrainSequences(split, order, document_start(config.data.document_mask, dataset, run.tokenizer))
    if len(run.plan.stages) > 1:
        notes.append(f"measured with the final batch size and context; the run starts with {run.plan.describe_stages()}")
    return run, source, notes
