"""How fast a recipe trains on this machine: the training loop itself, timed over a few steps.

Method: model, optimizer, number format and compilation are chosen as for a run and given to `train.loop.fit`. Warm-up steps
come first (the first one pays for compilation and memory), then steps that are timed whole, with no wait within them; then a
few with waits around forward pass and optimizer, which tell the parts; then, if asked, a few under PyTorch's profiler. Peak
speed is measured on one large matrix product in the same minute, because a data sheet's figure assumes clocks that a shared
or power-limited device never reaches.

Limits: one process. The parts are measured in steps of their own, whose waits cost a little, so that they need not add up to
the step's time. FLOPs are those of `model/arithmetic.py`: matrix products, attention's full square.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bardling.config import ModelConfig, RunConfig
from bardling.data.loader import Batch, BatchSource, Prefetcher, TrainWindows
from bardling.data.order import WindowOrder
from bardling.data.packing import document_start
from bardling.distributed.context import Context, distributed
from bardling.distributed.device import (
    DTYPES,
    Precision,
    choose_precision,
    device_name,
    matmul_flops,
    memory_used,
    prepare_backend,
)
from bardling.errors import UserError
from bardling.interop.dataset import open_data
from bardling.model.arithmetic import flops_per_token, fp8_layers
from bardling.model.depth import without_dial
from bardling.model.gpt import GPT
from bardling.model.layers import use_fp8
from bardling.model.peaks import peak_flops
from bardling.optim.build import build_optimizer, row_splits, settle_muon_precision
from bardling.optim.schedule import learning_rate
from bardling.planner import resolve_vocabulary
from bardling.train.compiling import asked_to_compile, compile_pays, wrap
from bardling.train.loop import fit
from bardling.train.plan import Horizon, TrainPlan, make_plan
from bardling.train.state import TrainState
from bardling.train.step import StepResult

PARTS_STEPS = 5  # most steps that the parts are measured in
PROFILED_STEPS = 3
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # large enough that starting the product costs nothing beside it


@dataclass(frozen=True)
class Operator:
    """One row of the profile."""

    name: str
    calls: float  # a step
    seconds: float  # a step, in the operator itself, without those that it calls


@dataclass(frozen=True)
class BenchResult:
    """What was measured. Times are in seconds, speeds in FLOP/s, memory in bytes."""

    device: str
    precision: Precision
    compiled: bool
    compile_why: str
    model: ModelConfig
    parameters: int
    plan: TrainPlan
    first_step_seconds: float  # with compilation and set-up
    step_seconds: tuple[float, ...]  # of each measured step, in order
    data_seconds: float  # of a step: waiting for its batches
    forward_seconds: float
    backward_seconds: float  # with clipping
    optimizer_seconds: float
    memory_bytes: int  # peak; of the whole process on a CPU
    flops_per_token: int
    peak_flops: float | None  # by the data sheet; None where there is none for this device
    matmul_flops: float  # measured
    notes: tuple[str, ...] = ()
    operators: tuple[Operator, ...] = ()  # the most expensive first
    trace: Path | None = None

    @property
    def median_seconds(self) -> float:
        """Step time: the median, which a hiccup of the machine does not move."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second, at the median step time."""
        return self.plan.tokens_per_step / self.median_seconds

    @property
    def flops_per_second(self) -> float:
        """Arithmetic speed reached (FLOP/s)."""
        return self.flops_per_token * self.tokens_per_second

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the part of the data sheet's peak that was reached (PaLM, arXiv:2204.02311, appendix B)."""
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops

    @property
    def mfu_of_matmul(self) -> float:
        """The same of the speed that matrix products reach here."""
        return self.flops_per_second / self.matmul_flops


def bench(
    config: RunConfig,
    *,
    steps: int = 20,
    warmup: int = 5,
    data: Literal["random", "real"] = "random",
    profile: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchResult:
    """Train for a few steps and measure them. Nothing is saved but the trace.

    Args:
        config: the recipe; what it leaves to `auto` is chosen as a run would.
        steps: steps to time.
        warmup: steps before these.
        data: random tokens, or the recipe's own (prepared first if need be).
        profile: folder for a trace that chrome://tracing, Perfetto and TensorBoard open.
        progress: told (steps done, steps in all).

    Raises:
        UserError: an option or the recipe does not fit, or memory does not suffice.
    """
    for name, value in (("steps", steps), ("warmup", warmup)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if profile is not None:
        _make_folder(profile)
    with distributed(config.device) as context:
        if context.world_size > 1:
            raise UserError(
                "bardling bench measures one process: start it without torchrun (a run's log shows the speed of many)"
            )
        undo = prepare_backend(context.device, deterministic=config.deterministic, attention=config.attention)
        try:
            return _Bench(without_dial(config), context, steps, warmup, data, profile, progress).go()
        except torch.OutOfMemoryError:
            micro = make_plan(config.train, config.model.block_size, 1).micro_batch
            raise UserError(
                f"{device_name(context.device)} has too little memory for {micro} sequences at a time: "
                f"try --train.micro_batch {max(micro // 2, 1)}"
            ) from None
        finally:
            undo()


class RandomWindows:
    """Random tokens in place of a dataset's windows; a sample's tokens depend on its number alone."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab_size, self._block_size = vocab_size, block_size

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs, and the same shifted by one."""
        windows = np.random.default_rng(first_sample).integers(0, self._vocab_size, (size, self._block_size + 1))  # [B, T + 1]
        tokens = torch.from_numpy(windows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class _Bench:
    """One measurement: the parts of a run, and the clocks."""

    def __init__(
        self,
        config: RunConfig,
        context: Context,
        steps: int,
        warmup: int,
        data: str,
        profile: Path | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self.context, self.device, self.profile, self.progress = context, context.device, profile, progress
        self.warmup, self.steps, self.parts = warmup, steps, min(steps, PARTS_STEPS)
        self.total = warmup + steps + self.parts + (PROFILED_STEPS if profile else 0)
        growing = make_plan(config.train, config.model.block_size, 1)
        self.plan = dataclasses.replace(growing, stages=(dataclasses.replace(growing.stages[-1], first_step=0),))
        model, self.source, self.notes = _model_and_source(config, data)
        if len(growing.stages) > 1:
            self.notes = [
                *self.notes,
                f"measured with the whole batch and context; before that the run has {growing.in_words()}",
            ]
        left, mixed = (fp8_layers(model)[1], model) if config.fp8 else (None, None)
        self.precision = choose_precision(config.precision, self.device, fp8_but=left)
        self.matmul = matmul_flops(
            self.device, DTYPES[self.precision.name], size=MATMUL_SIZE.get(self.device.type, 1024), seconds=0.3
        )
        self.name = device_name(self.device)
        self.peak = peak_flops(self.name, self.precision.name, tf32=not config.deterministic, fp8=mixed)
        flops = flops_per_token(model)
        compiled, self.compile_why = asked_to_compile(config, self.device)
        if compiled is None:
            run_flops = float(growing.cost(partial(flops_per_token, model)))
            compiled, self.compile_why = compile_pays(run_flops, self.peak or self.matmul, self.device, growing.shapes)
            self.compile_why = f"auto: a run of {config.train.steps:,} steps {self.compile_why}"
        self.compiled, self.flops = compiled, flops
        self.config = dataclasses.replace(config, model=model)

    def go(self) -> BenchResult:
        """Warm up, measure, and put the figures together."""
        config, device = self.config, self.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = GPT(config.model, seed=config.seed).to(device)
        use_fp8(model.transformer.h, config.fp8)
        model.recompute = config.train.recompute == "blocks"
        optim = settle_muon_precision(config.optim, self.precision.name)
        splits = row_splits(config.model)
        optimizer = build_optimizer(model.named_parameters(), optim, device, splits=splits, compiled=self.compiled)
        state = TrainState(model, optimizer)
        if self.precision.needs_scaler:
            state.scaler = torch.amp.GradScaler(device.type)
        forward = wrap(model, compiled=self.compiled, graphs=config.cuda_graphs, context=self.context)
        requests = self.plan.requests(0, self.total, 0)
        with Prefetcher(self.source, requests, device) as batches:
            first = self._train(state, batches, forward, 1)[0]
            if self.warmup > 1:
                self._train(state, batches, forward, self.warmup - 1)
            seconds = self._train(state, batches, forward, self.steps)
            parts = self._parts(state, batches, forward)
            memory = memory_used(device)
            operators, trace = self._profile(state, batches, forward) if self.profile else ((), None)
        return BenchResult(
            device=self.name,
            precision=self.precision,
            compiled=self.compiled,
            compile_why=self.compile_why,
            model=config.model,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            plan=self.plan,
            first_step_seconds=first,
            step_seconds=tuple(seconds),
            data_seconds=parts["data"],
            forward_seconds=parts["forward"],
            backward_seconds=parts["backward"],
            optimizer_seconds=parts["optimizer"],
            memory_bytes=memory,
            flops_per_token=self.flops,
            peak_flops=self.peak,
            matmul_flops=self.matmul,
            notes=tuple(self.notes),
            operators=operators,
            trace=trace,
        )

    def _train(
        self, state: TrainState, batches: Iterator[Batch], forward: Callable[..., torch.Tensor], steps: int
    ) -> list[float]:
        """Do `steps` more steps as a run does; returns the seconds of each."""
        clock = _StepClock(self.device)

        def hook(state: TrainState, result: StepResult | None) -> None:
            clock.mark()
            if result is not None:
                self.progress(state.step, self.total)

        fit(
            state,
            batches,
            dataclasses.replace(self.plan, horizon=Horizon(state.step + steps)),
            lr_at=lambda step: learning_rate(step, self.config.optim, self.config.train.steps),
            grad_clip=self.config.train.grad_clip,
            seed=self.config.seed,
            forward=forward,
            precision=self.precision,
            context=self.context,
            keep_gradients=self.config.cuda_graphs,
            hooks=[hook],
        )
        return clock.seconds()

    def _parts(self, state: TrainState, batches: Iterator[Batch], forward: Callable[..., torch.Tensor]) -> dict[str, float]:
        """Seconds of a step's parts, with a wait for the device around each."""
        spent = {"data": 0.0, "forward": 0.0, "optimizer": 0.0}
        started = [0.0]

        def now() -> float:
            synchronize(self.device)
            return time.perf_counter()

        def timed_batches() -> Iterator[Batch]:
            while True:
                start = now()
                batch = next(batches, None)
                spent["data"] += now() - start
                if batch is None:
                    return
                yield batch

        def timed_forward(*arguments: Any, **options: Any) -> torch.Tensor:
            start = now()
            loss = forward(*arguments, **options)
            spent["forward"] += now() - start
            return loss

        def before(*_: object) -> None:
            started[0] = now()

        def after(*_: object) -> None:
            spent["optimizer"] += now() - started[0]

        hooks = [state.optimizer.register_step_pre_hook(before), state.optimizer.register_step_post_hook(after)]
        try:
            total = sum(self._train(state, timed_batches(), timed_forward, self.parts))
        finally:
            for hook in hooks:
                hook.remove()
        spent["backward"] = max(total - sum(spent.values()), 0.0)
        return {name: seconds / self.parts for name, seconds in spent.items()}

    def _profile(
        self, state: TrainState, batches: Iterator[Batch], forward: Callable[..., torch.Tensor]
    ) -> tuple[tuple[Operator, ...], Path]:
        """Run some steps under the profiler; writes the trace and sums up its operators."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        assert self.profile is not None
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profiler(activities=activities) as record:
            self._train(state, batches, forward, PROFILED_STEPS)
            synchronize(self.device)
        # The ending is the one that TensorBoard's profiler page looks for; a time keeps earlier traces.
        trace = self.profile / f"bardling-{time.time_ns() // 10**6}.pt.trace.json.gz"
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


class _StepClock:
    """Marks the ends of steps without making the host wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A step has been given to the device."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
            return
        synchronize(self._device)
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between the marks."""
        synchronize(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _model_and_source(config: RunConfig, data: str) -> tuple[ModelConfig, BatchSource, list[str]]:
    """The model with its vocabulary known, and where its batches come from."""
    if data == "random":
        model, notes = resolve_vocabulary(config)
        if config.data.document_mask:
            notes.append(
                "Random tokens are no documents: data.document_mask plays no part; --data real takes the recipe's own."
            )
        return model, RandomWindows(model.vocab_size, model.block_size), notes
    dataset = open_data(config.data)
    wanted = config.model.vocab_size
    if wanted and wanted < dataset.vocab_size:
        raise UserError(f"model.vocab_size = {wanted} is smaller than the tokenizer's {dataset.vocab_size}: leave it out")
    split = dataset.split("train")
    order = WindowOrder(config.seed, len(split), config.model.block_size)
    source = TrainWindows(split, order, document_start(config.data.document_mask, dataset, dataset.tokenizer))
    return dataclasses.replace(config.model, vocab_size=wanted or dataset.vocab_size), source, []


def _make_folder(path: Path) -> None:
    """Make the folder for traces now, rather than fail after the measurement."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--profile {path}: a file is in the way; name a folder") from None
    except OSError as error:
        raise UserError(f"--profile {path}: cannot be made ({error.strerror})") from None
