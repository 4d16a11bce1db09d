"""The trials of `chaos.py --layout shard`: runs of two processes that hold shards (FSDP2) and write checkpoints together.

A fault hits one process or both. The run is then resumed by two processes with shards, or, in half of the trials, by one
process or by two that hold the whole model (DDP). A run that keeps its layout must end bitwise equal to an undisturbed one;
with another layout, its losses must be equal to 1e-5, relative to their value, and the samples of its steps the same. Such runs
have no dropout, because masks depend on which process draws them.
"""

import random
import signal
from pathlib import Path
from typing import Any

import torch.distributed.fsdp  # noqa: F401  otherwise each process would import it

from bardling.checkpoint.run_folder import RunFolder
from trial_job import Job
from trial_outcome import Outcome, ended_well, records, steps_logged
from trial_process import Process
from trial_runs import RECIPE, STEPS, Trials

RANK_TIMEOUT = 8.0  # seconds
FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "in validation", "in saving", "disk full", "failing fsync", "flipped byte")
TURNS = (*FAULTS, "SIGKILL", "in saving", "failing fsync", "SIGKILL", "in validation", "in saving")
"""The faults in turn: those that only several processes can suffer from come more often."""
_LAYOUTS = ("", "", "one process", "DDP")


class ShardedTrials(Trials):
    """Two processes, and what is expected of them."""

    faults, turns = FAULTS, TURNS
    equality = "equal"
    processes = 2
    text = RECIPE.replace("log_every = 1\n", f'log_every = 1\nrank_timeout = {RANK_TIMEOUT}\n[parallel]\nlayout = "fsdp"\n')
    damaged = "*-of-*"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.without_dropout, self.still_without_dropout = folder / "no-dropout.toml", folder / "undisturbed-no-dropout"
        self.without_dropout.write_text(self.recipe.read_text().replace("dropout = 0.1", "dropout = 0.0"))

    def launch(self, arguments: list[str], log: Path, outcome: Outcome | None = None, **options: Any) -> Any:
        options.pop("terminal", None)
        layout = "" if outcome is None or arguments[0] != "resume" else outcome.layout
        if layout == "one process":
            return Process(arguments, log)
        return Job([*arguments, *["--parallel.layout", "ddp"][: 2 * (layout == "DDP")]], log, self.processes, **options)

    def _prepare(self, outcome: Outcome, draw: random.Random) -> None:
        outcome.layout = draw.choice(_LAYOUTS)
        if outcome.layout and not self.still_without_dropout.exists() and outcome.resumed:
            self._undisturbed(self.without_dropout, self.still_without_dropout)

    def _recipe(self, outcome: Outcome) -> Path:
        return self.without_dropout if outcome.layout else self.recipe

    def _signal(self, run: Path, log: Path, draw: random.Random, outcome: Outcome) -> None:
        phase = outcome.fault.removeprefix("in ") if outcome.fault.startswith("in ") else ""
        job = self._start(run, log, draw, outcome, phase)
        assert isinstance(job, Job)
        self._await_phase(job, run, log, draw, outcome, phase)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
        number = draw.choice(numbers) if phase else signal.Signals[outcome.fault]
        if draw.random() < 0.6:
            job.targets = (draw.randrange(self.processes),)
            job.wait_until(run.exists)  # before they have met, a process waits for the others for as long as it takes
        whom = "both" if len(job.targets) > 1 else f"rank {job.targets[0]}"
        outcome.what = f"{number.name} to {whom} {outcome.what}"
        begun = steps_logged(run) > 0
        self._end(job, number, draw, outcome)
        outcome.asked_to_stop &= begun
        outcome.timed = outcome.seconds > 0
        if number == signal.SIGKILL:
            outcome.limit += RANK_TIMEOUT
        finished = (run / "checkpoints" / f"step-{STEPS:06d}").is_dir()
        outcome.ended_well = ended_well(run, saved=outcome.asked_to_stop)
        for rank, status in enumerate(job.statuses):
            expected = {0, 128 + number}
            if number == signal.SIGKILL:
                expected = {0, -number if rank in job.targets else 1}
            elif not begun or finished:  # it had no handler, or another process left first
                expected |= {-number, 1}
            outcome.ended_well &= status in expected
        outcome.notes[-1] = f"statuses {', '.join(map(str, job.statuses))}" if job.status else "status 0"

    def _compare(self, run: Path, outcome: Outcome) -> None:
        if not outcome.survived:
            return
        if not outcome.layout:
            outcome.model_equal = _weights(run) == _weights(self.still)
            outcome.metrics_equal = all(
                records(run, name) == records(self.still, name) for name in ("metrics.jsonl", "samples.jsonl")
            )
            return
        if outcome.starts > 1:
            outcome.notes.append(f"resumed by {outcome.layout}")
        store = RunFolder(run).store()
        outcome.model_equal = not store.verify(store.path(STEPS))
        outcome.metrics_equal = _same_losses(run, self.still_without_dropout)


def _weights(run: Path) -> dict[str, bytes]:
    """The files of the final weights."""
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step-{STEPS:06d}").glob("model*.safetensors")}


def _same_losses(run: Path, still: Path) -> bool:
    """Whether the steps and validations of two runs agree, and they have read the same samples."""
    one, two = records(run, "metrics.jsonl"), records(still, "metrics.jsonl")
    return len(one) == len(two) and all(
        (a["kind"], a["step"], a.get("order_digest")) == (b["kind"], b["step"], b.get("order_digest"))
        and abs(float(str(a["loss"])) - float(str(b["loss"]))) <= 1e-5 * float(str(b["loss"]))
        for a, b in zip(one, two, strict=True)
        if "loss" in b
    )
