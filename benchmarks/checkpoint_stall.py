"""Checkpoint stall: how long a step waits for an asynchronous save, compared with a synchronous one.

    python benchmarks/checkpoint_stall.py            # GPT-2 124M: about 5 GB of memory, 6 GB of disk, two minutes
    python benchmarks/checkpoint_stall.py --tiny     # one second: to try the script

Method. The library's `checkpoint/saver.py` saves one state (random weights, AdamW with both moments) into two runs,
synchronously and asynchronously, alternating which goes first. Between rounds, the optimizer takes a step with artificial
gradients, so that every save has new content. Both variants write, sync and checksum the same files on the same disk; the
checksums of each pair are compared. The stall is the time until `save` returns: the copy to host memory. The background time
is from then until the checkpoint is on disk, with no training in between. The slowdown is how much longer a fixed amount of
work (matmuls on all threads) takes while the writer is busy.

As in training, where this happens after the first step, memory is reserved before the first asynchronous save.
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

from bardling.checkpoint.run_folder import RunFolder
from bardling.checkpoint.saver import Saver
from bardling.cli.parse import parse
from bardling.config import CheckpointConfig, ModelConfig, OptimConfig, RunConfig
from bardling.config.recipes import config_to_dict
from bardling.distributed.context import Context
from bardling.distributed.device import Precision, choose_device, synchronize
from bardling.errors import UserError
from bardling.training.build import Execution, build
from bardling.training.state import TrainState
from tables import Table, megabytes, publish, say, script, spread

TARGET = 0.15
SIZES = {
    "gpt2-124m": ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
    "tiny": ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65),
}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    rounds: int = 7
    """Pairs of saves."""
    device: str = "cpu"
    """Device that holds the state."""
    folder: Path | None = None
    """Folder on the disk to write to; default: the system's temporary folder."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Measure a tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure, compare the files, print and append the table; status 2 if the stall exceeds the target."""
    options = parse(Options, argv, prog="checkpoint_stall.py", description="How long a step waits for a checkpoint.")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    name = "tiny" if options.tiny else "gpt2-124m"
    device = choose_device(options.device, 0)
    state = build_state(SIZES[name], device)
    saved = state.saved()
    size = sum(tensor.nbytes for tensor in [*saved.model_state.values(), *saved.optimizer_tensors.values()])
    room = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=options.folder))
    try:
        if shutil.disk_usage(room).free < 5 * size:
            raise UserError(f"{room}: not enough free space: {5 * size / 1e9:.1f} GB are needed; choose another --folder")
        rows, notes, ratio = measure(state, SIZES[name], device, room, options.rounds)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    title = f"{name}: {megabytes(size)} MB per checkpoint, {options.rounds} pairs of saves"
    table = Table(title, ("seconds, median (minimum-maximum)", "value"), rows, notes)
    publish("checkpoint_stall", [table], device=device, command=argv, folder=options.results)
    if ratio > TARGET and not options.tiny:
        raise UserError(f"the stall is {ratio:.1%} of a synchronous save; the target is {TARGET:.0%}")


def build_state(config: ModelConfig, device: torch.device) -> TrainState:
    """Random weights, and an AdamW that has taken one step."""
    execution = Execution(Precision("float32", "as asked", device.type))
    state = build(config, OptimConfig(), execution, Context(0, 1, device), seed=1).state
    advance(state)
    return state


def advance(state: TrainState) -> None:
    """One step with gradients computed from the weights."""
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach() * 1e-3 + 1e-4
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    synchronize(next(state.model.parameters()).device)


def measure(
    state: TrainState, model: ModelConfig, device: torch.device, room: Path, rounds: int
) -> tuple[list[tuple[str, str]], list[str], float]:
    """Save in pairs; returns the rows, notes, and the median ratio of stall to synchronous save."""
    kinds = ("synchronous", "asynchronous")
    runs = {kind: RunFolder(room / kind) for kind in kinds}
    run_config = config_to_dict(dataclasses.replace(RunConfig(), model=model))
    savers = {
        kind: Saver(
            runs[kind],
            CheckpointConfig(keep_last=1, asynchronous=kind == "asynchronous"),
            Context(0, 1, device),
            tokenizer=None,
            run_config=run_config,
            note=say,
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
            synchronize(device)
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
        ("the same, until it is on disk in the background", spread(took["background"])),
        ("stall / synchronous save, per pair", spread([100 * value for value in ratios], "{:.1f}") + " %"),
        ("training-like work while writing / alone", spread(took["slowdown"])),
    ]
    notes = [
        f"target: at most {TARGET:.0%} of a synchronous save: {'met' if ratio <= TARGET else 'MISSED'}",
        "both checkpoints of each pair have the same checksums for all files",
    ]
    return rows, notes, ratio


def compare(places: Sequence[Path]) -> None:
    """Check that both variants write the same bytes."""
    first, second = (json.loads((place / "manifest.json").read_text())["files"] for place in places)
    differing = [name for name in first if first[name] != second.get(name)]
    if differing or first.keys() != second.keys():
        raise UserError(f"{places[1]}: differs from {places[0]} in {', '.join(differing) or 'its files'}")


class TrainingLikeWork:
    """Matmuls on all threads that take about 0.25 s on an idle machine."""

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
