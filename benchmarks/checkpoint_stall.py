"""Checkpoint stall: for how long a step waits for an asynchronous save, beside the time of a synchronous one.

    python benchmarks/checkpoint_stall.py            # GPT-2 124M: about 5 GB of memory, 6 GB of disk, two minutes
    python benchmarks/checkpoint_stall.py --tiny     # a second: to try the script

Method. The library's own `train/saving.py` saves one state (random weights, AdamW with both moments) into two runs of
their own, alternating, the order turning with the round: synchronously, and asynchronously. Between two rounds the
optimizer does a step with made-up gradients, so that every save has new content. Both write, sync and checksum the same
files on the same disk; the checksums of each pair are compared. The stall is the time until `save` returns: the copy to
host memory. The time in the background is that from then until the checkpoint is on the disk, while nothing is trained.
The slowdown is how much longer a fixed piece of work (matrix products on all threads) takes while the writer is busy.

The first asynchronous save of a run finds its memory prepared, as in training, where this happens after the first step.
"""

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bardling.checkpoint.runfolder import RunFolder
from bardling.cli.parse import parse
from bardling.config import CheckpointConfig, ModelConfig, RunConfig
from bardling.distributed.context import Context
from bardling.distributed.device import choose_device
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.train.saving import Saver, state_bytes
from bardling.train.state import TrainState
from tables import Table, megabytes, publish, say, script, spread

TARGET = 0.15
SIZES = {
    "gpt2-124m": ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
    "tiny": ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65),
}


@dataclass(frozen=True)
class Options:
    """What to measure, and where."""

    rounds: int = 7
    """Pairs of saves."""
    device: str = "cpu"
    """Where the state is."""
    folder: Path | None = None
    """Disk to write to; unset takes the system's folder for temporary files."""
    results: Path | None = None
    """Folder to append the table in; unset takes benchmarks/results."""
    tiny: bool = False
    """Measure a tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure, compare the content, print and append the table; status 2 when the stall is above the target."""
    options = parse(Options, argv, prog="checkpoint_stall.py", description="How long a step waits for a checkpoint.")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    name = "tiny" if options.tiny else "gpt2-124m"
    device = choose_device(options.device, 0)
    state = build(SIZES[name], device)
    room = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=options.folder))
    try:
        if shutil.disk_usage(room).free < 5 * state_bytes(state):
            raise UserError(
                f"{room}: not enough room: {5 * state_bytes(state) / 1e9:.1f} GB are needed: choose another --folder"
            )
        rows, notes, ratio = measure(state, SIZES[name], device, room, options.rounds)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    title = f"{name}: {megabytes(state_bytes(state))} MB a checkpoint, {options.rounds} pairs of saves"
    table = Table(title, ("seconds, median (smallest-largest)", "value"), rows, notes)
    publish("checkpoint_stall", [table], device=device, command=argv, folder=options.results)
    if ratio > TARGET and not options.tiny:
        raise UserError(f"the stall is {ratio:.1%} of a synchronous save; the target is {TARGET:.0%}")


def build(config: ModelConfig, device: torch.device) -> TrainState:
    """Random weights, and an AdamW that has done one step."""
    model = GPT(config, seed=1).to(device)
    state = TrainState(model, build_optimizer(model.named_parameters(), RunConfig().optim, device))
    advance(state)
    return state


def advance(state: TrainState) -> None:
    """One step with gradients made of the weights."""
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach() * 1e-3 + 1e-4
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    settle(state)


def settle(state: TrainState) -> None:
    """Wait for the device."""
    device = next(state.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    state: TrainState, model: ModelConfig, device: torch.device, room: Path, rounds: int
) -> tuple[list[tuple[str, str]], list[str], float]:
    """Save in pairs; returns the rows, notes, and the median ratio of stall to synchronous save."""
    kinds = ("synchronous", "asynchronous")
    runs = {kind: RunFolder(room / kind) for kind in kinds}
    savers = {
        kind: Saver(
            runs[kind],
            dataclasses.replace(
                RunConfig(), model=model, checkpoint=CheckpointConfig(keep_last=1, asynchronous=kind == "asynchronous")
            ),
            None,
            Context(0, 1, device),
            tell=say,
            flush=lambda: None,
        )
        for kind in kinds
    }
    savers["asynchronous"].prepare(state)
    savers["asynchronous"].wait()
    work = TrainingLikeWork(device)
    took: dict[str, list[float]] = {"synchronous": [], "asynchronous": [], "background": [], "slowdown": []}
    for number in range(rounds):
        for kind in kinds if number % 2 else reversed(kinds):
            settle(state)
            begin = time.perf_counter()
            savers[kind].save(state)
            took[kind].append(time.perf_counter() - begin)
            if kind == "asynchronous":
                begin = time.perf_counter()
                savers[kind].wait()
                took["background"].append(time.perf_counter() - begin)
        compare([runs[kind].store().path(state.step) for kind in kinds])
        stall, whole = took["asynchronous"][-1], took["synchronous"][-1]
        say(f"pair {number + 1} of {rounds}: {stall:.3f} s of stall, {whole:.2f} s waited for")
        advance(state)
        alone = work.seconds()
        savers["asynchronous"].save(state)
        took["slowdown"].append(work.seconds() / alone)
        savers["asynchronous"].wait()
        advance(state)
    ratios = [stall / whole for stall, whole in zip(took["asynchronous"], took["synchronous"], strict=True)]
    ratio = statistics.median(ratios)
    rows = [
        ("synchronous save", spread(took["synchronous"])),
        ("stall of an asynchronous save", spread(took["asynchronous"], "{:.3f}")),
        ("the same in the background, until it is on the disk", spread(took["background"])),
        ("stall / synchronous save, of each pair", spread([100 * value for value in ratios], "{:.1f}") + " %"),
        ("training-like work while writing / alone", spread(took["slowdown"])),
    ]
    notes = [
        f"target: at most {TARGET:.0%} of a synchronous save: {'met' if ratio <= TARGET else 'MISSED'}",
        "each pair of checkpoints has the same checksums for all files",
    ]
    return rows, notes, ratio


def compare(places: Sequence[Path]) -> None:
    """Both ways must write the same bytes."""
    first, second = (json.loads((place / "manifest.json").read_text())["files"] for place in places)
    differing = [name for name in first if name != "run_config.json" and first[name] != second.get(name)]
    if differing or first.keys() != second.keys():
        raise UserError(f"{places[1]}: differs from {places[0]} in {', '.join(differing) or 'its files'}")


class TrainingLikeWork:
    """Matrix products on all threads that take about a quarter of a second where nothing else runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._matrix = torch.randn(768, 3072, device=device)
        self._times = 1
        while (seconds := self.seconds()) < 0.25:
            self._times = max(self._times + 1, int(self._times * min(0.3 / max(seconds, 1e-6), 8)))

    def seconds(self) -> float:
        """Do the work once."""
        begin = time.perf_counter()
        for _ in range(self._times):
            self._matrix.T @ self._matrix
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


if __name__ == "__main__":
    script(main)
