"""Where the time of a training step goes: its phases by wall-clock time, and its operators by PyTorch's profiler.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --settings gpt2 --top 20
    PYTHONPATH=OTHER_CHECKOUT/src python benchmarks/step_profile.py      # the same for another version, to compare

Two small models whose steps consist of many short operators: GPT-2 with 4 layers and width 128 (context 64, batch 12, AdamW),
and the Qwen3 of the recipe `shakespeare-cpu` with 2 layers (batch 16, Muon). Phases are timed separately, each as the 10th
percentile of --steps repetitions; `the rest` is the remaining time of a step: clearing and clipping gradients, counters,
metrics. Operator times exclude nested operators, and the profiler inflates them.
"""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bardling.cli.parse import parse
from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision, backend
from bardling.errors import UserError
from bardling.training.build import Execution, build
from bardling.training.objective import NextToken
from bardling.training.step import StepSettings, train_step
from tables import Table, publish, script

SETTINGS = {
    "gpt2": (
        ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False, gelu="erf"),
        OptimConfig(lr=1e-3),
        12,
    ),
    "qwen3": (
        ModelConfig(family="qwen3", n_layer=2, n_head=4, n_embd=128, block_size=64, vocab_size=65, tied=False),
        OptimConfig(name="muon", lr=0.01, muon_lr=0.04, muon_steps=3, muon_precision="bfloat16", momentum=0.9),
        16,
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Of gpt2, qwen3."""
    steps: int = 100
    """Repetitions of each phase."""
    top: int = 14
    """Operators in the table."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""


def main(argv: Sequence[str]) -> None:
    """Measure and write the tables."""
    options = parse(Options, argv, prog="step_profile.py", description="Where the time of a training step goes.")
    for name in options.settings:
        if name not in SETTINGS:
            raise UserError(f"--settings {name}: choose from {', '.join(SETTINGS)}")
    for name in ("steps", "top"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    with backend(torch.device("cpu"), deterministic=False):
        tables = [table for name in options.settings for table in measure(name, options)]
    publish("step_profile", tables, device=torch.device("cpu"), command=argv, folder=options.results)


def measure(name: str, options: Options) -> list[Table]:
    """The tables of one setting."""
    config, optim, size = SETTINGS[name]
    precision = Precision("bfloat16", "as asked", "cpu")
    assembly = build(config, optim, Execution(precision), SINGLE)
    state, model, settings = assembly.state, assembly.state.model, StepSettings(NextToken(), precision, SINGLE)
    tokens = torch.randint(config.vocab_size, (size, config.block_size), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, 1))

    def step() -> None:
        train_step(state, [batch], settings, forward=assembly.forward, lr=1e-3)

    def forward() -> torch.Tensor:
        with precision.autocast():
            loss: torch.Tensor = model(batch.inputs, batch.targets, reduction="sum")
            return loss

    whole, faults = timed(step, options.steps), page_faults(step)
    ahead, both = timed(forward, options.steps), timed(lambda: torch.autograd.backward(forward()), options.steps)
    update = timed(state.optimizer.step, options.steps)
    parts = {"forward": ahead, "backward": both - ahead, "optimizer": update, "the rest": whole - both - update, "step": whole}
    title = f"Phases of a step ({name})"
    notes = [f"{config.n_layer} layers of width {config.n_embd}, context {config.block_size}, batch {size}, bfloat16, eager"]
    notes.append(f"page faults: {faults:.0f} per step")
    rows = [(part, f"{seconds * 1e3:.2f}", f"{seconds / whole:.0%}") for part, seconds in parts.items()]
    return [Table(title, ("part", "ms", "of the step"), rows, notes), operators(name, step, options)]


def timed(work: Callable[[], object], repetitions: int) -> float:
    """10th percentile of the repetitions (seconds)."""
    seconds = []
    for number in range(repetitions + 10):
        begun = time.perf_counter()
        work()
        if number >= 10:
            seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[repetitions // 10]


def page_faults(work: Callable[[], object], repetitions: int = 20) -> float:
    """Page faults per repetition."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repetitions):
        work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / repetitions


def operators(name: str, step: Callable[[], None], options: Options) -> Table:
    """The slowest operators, over ten steps."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(10):
            step()
    found = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
    times = {event.key: event.self_cpu_time_total / 10 for event in found}  # microseconds per step
    whole = sum(times.values())
    rows = [
        (event.key, f"{event.count / 10:.0f}", f"{times[event.key] / 1e3:.2f}", f"{times[event.key] / whole:.0%}")
        for event in found[: options.top]
    ]
    notes = [f"{sum(event.count for event in found) / 10:.0f} calls per step; these take the most time in total"]
    return Table(f"Operators of a step ({name})", ("operator", "calls", "ms", "of all"), rows, notes)


if __name__ == "__main__":
    script(main)
