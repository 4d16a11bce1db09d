"""The trials of `chaos.py` with a run of one process: recipe and undisturbed runs, faults, and the comparison."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

from bardling.errors import ONE_REQUEST
from faults import FsyncFaults, SmallDisk, flip_byte
from trial_outcome import INTERVAL, Outcome, being_saved, ended_well, newest, records, steps_logged
from trial_process import PHASES, Process

STEPS = 60
RECIPE = f"""
device = "cpu"
precision = "float32"
compile = "off"
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
dropout = 0.1
[data]
source = "@TEXT@"
tokenizer = "char"
val_fraction = 0.1
[optim]
warmup_steps = 5
[train]
steps = {STEPS}
batch_size = 4
micro_batch = 2
log_every = 1
[eval]
every = 20
windows = 8
[sample]
every = 30
max_new_tokens = 8
[checkpoint]
every = {INTERVAL}
keep_last = 2
"""
FAULTS = (
    *("SIGKILL", "SIGTERM", "disk full", "failing fsync", "flipped byte", "SIGHUP", "SIGINT twice", "closed terminal"),
    *("signal in validation", "signal in saving", "signal in rendezvous", "signal in compilation"),
)
TURNS = (
    *FAULTS,
    *(
        "SIGKILL",
        "SIGTERM",
        "SIGHUP",
        "SIGINT twice",
        "closed terminal",
        "signal in validation",
        "signal in saving",
        "disk full",
    ),
)
"""The faults in turn: compilation, which takes long, and the faults of the disk come less often."""

COMPILING = b"compiling the model"
_MOST_STARTS = 5


class Trials:
    """What all trials share: the recipe, the undisturbed runs and their duration."""

    faults, turns = FAULTS, TURNS
    equality = "bitwise equal"  # to the undisturbed run
    processes = 1  # of a run
    text = RECIPE
    damaged = "*"  # names of the files in which a byte is flipped

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words, text = random.Random(0), folder / "text.txt"
        names = ["king", "queen", "rose", "thorn", "night", "day", "love", "war", "sea", "storm"]
        text.write_text("".join("The {} and the {} met {} times.\n".format(*words.sample(names, 2), n % 7) for n in range(900)))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(self.text.replace("@TEXT@", str(text)))
        self.compiled_recipe = folder / "compiled.toml"
        self.compiled_recipe.write_text(self.recipe.read_text().replace('compile = "off"', 'compile = "on"'))
        os.environ["BARDLING_CACHE"] = str(folder / "cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        self.disks = SmallDisk.possible(folder)
        self.still, self.compiled_still = folder / "undisturbed", folder / "undisturbed-compiled"
        self.fsyncs: dict[int, int] = {}  # calls of each process
        for rank in (0, *range(self.processes)):  # the first run prepares the data
            shutil.rmtree(self.still, ignore_errors=True)
            counted = FsyncFaults(range(0))
            self.seconds = self._undisturbed(self.recipe, self.still, counted, rank)
            self.fsyncs[rank] = counted.count
        self.size = sum(path.stat().st_size for path in (self.still / "checkpoints" / f"step-{STEPS:06d}").iterdir())
        if not all(self.fsyncs.values()):
            raise SystemExit("fsync interception saw no calls, so it cannot make one fail")
        self.compiling = 0.0  # how long the compiler takes (s), once it has run to its end

    def launch(self, arguments: list[str], log: Path, outcome: Outcome | None = None, **options: Any) -> Process:
        """Start a `bardling` command; `options` are those of `Process`."""
        options.pop("faulty", None)
        return Process(arguments, log, **options)

    def _undisturbed(self, recipe: Path, run: Path, counted: FsyncFaults | None = None, faulty: int = 0) -> float:
        """Train without a fault; returns the duration (s)."""
        began, log = time.monotonic(), run.with_suffix(".log")
        process = self.launch(["train", str(recipe), "--out", str(run)], log, faults=counted, faulty=faulty)
        if recipe == self.compiled_recipe:
            process.wait_until(lambda: COMPILING in log.read_bytes())
            begin = time.monotonic()
            process.wait_until(lambda: steps_logged(run) > 0)
            self.compiling = time.monotonic() - begin
        if process.wait() != 0:
            raise SystemExit(log.read_text())
        return time.monotonic() - began

    def _prepare(self, outcome: Outcome, draw: random.Random) -> None:
        """Do what only some faults need."""
        if outcome.fault == "signal in compilation" and not self.compiling and outcome.resumed:
            self._undisturbed(self.compiled_recipe, self.compiled_still)

    def _recipe(self, outcome: Outcome) -> Path:
        return self.compiled_recipe if outcome.fault == "signal in compilation" else self.recipe

    def run(self, number: int, outcome: Outcome, draw: random.Random) -> None:
        """One trial."""
        fault = outcome.fault
        self._prepare(outcome, draw)
        place = self.folder / f"trial{number}"
        place.mkdir()
        log = self.folder / f"trial{number}.log"
        disk = SmallDisk(place, 64) if fault == "disk full" else contextlib.nullcontext()
        with disk:
            run = place / "run"
            try:
                if isinstance(disk, SmallDisk):
                    self._fill_disk(run, log, draw, outcome, disk)
                elif fault == "failing fsync":
                    self._fail_fsyncs(run, log, draw, outcome)
                elif fault == "flipped byte":
                    self._flip_byte(run, log, draw, outcome)
                else:
                    self._signal(run, log, draw, outcome)
                if outcome.resumed:
                    self._finish(run, log, outcome)
                    self._compare(run, outcome)
            except TimeoutError as error:
                outcome.ended_well = False
                outcome.notes.append(str(error))
        shutil.rmtree(place, ignore_errors=True)
        if outcome.good:
            log.unlink()

    def _signal(self, run: Path, log: Path, draw: random.Random, outcome: Outcome) -> None:
        """Send a signal at a random moment, or in the phase that the name of the fault ends with."""
        phase = outcome.fault.removeprefix("signal in ") if outcome.fault.startswith("signal in") else ""
        process = self._start(run, log, draw, outcome, phase)
        self._await_phase(process, run, log, draw, outcome, phase)
        if phase:
            number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
            outcome.what = f"{number.name} {outcome.what}"
        elif outcome.fault == "SIGINT twice":
            number = signal.SIGINT
        else:
            number = signal.SIGHUP if outcome.fault == "closed terminal" else signal.Signals[outcome.fault]
        self._end(process, number, draw, outcome)
        outcome.ended_well = ended_well(run, saved=outcome.asked_to_stop)
        expected = {0, 128 + number}  # 0: it had finished
        if number == signal.SIGKILL or not run.exists():  # the signal came before the program had a handler for it
            expected.add(-number)
        outcome.ended_well &= process.status in expected

    def _await_phase(self, process: Process, run: Path, log: Path, draw: random.Random, outcome: Outcome, phase: str) -> None:
        match phase:
            case "":
                self._await_moment(process, run, draw, outcome)
            case "compilation":
                process.wait_until(lambda: COMPILING in log.read_bytes())
                end = time.monotonic() + draw.random() * (self.compiling or 30.0)
                process.wait_until(lambda: time.monotonic() > end or steps_logged(run) > 0)
            case "saving":
                outcome.what = f"after step {(at := draw.randrange(STEPS))}"
                process.wait_until(lambda: steps_logged(run) >= at)
                process.wait_until(lambda: being_saved(run))
            case _:
                process.wait_until(process.reached)
                process.pause(draw.random() * (1.0 if phase == "rendezvous" else 0.01))

    def _start(self, run: Path, log: Path, draw: random.Random, outcome: Outcome, phase: str) -> Process:
        recipe, environment = self._recipe(outcome), dict[str, str]()
        if phase == "compilation":
            if draw.random() < 0.25:  # in an empty cache, it compiles as for the first time
                environment["TORCHINDUCTOR_CACHE_DIR"] = str(run.parent / "compiled")
        elif phase == "rendezvous":
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            outcome.what = f"as rank {(rank := draw.randrange(2))}"
            environment |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        announced = phase if phase in PHASES else ""
        terminal, command = outcome.fault == "closed terminal", ["train", str(recipe), "--out", str(run)]
        return self.launch(command, log, environment=environment, phase=announced, terminal=terminal)

    def _await_moment(self, process: Process, run: Path, draw: random.Random, outcome: Outcome) -> None:
        """A random moment between start and exit, or after a random step, or in the first save after it."""
        at, kind = draw.randrange(STEPS), draw.randrange(4)
        if kind == 0:  # any moment, including start-up
            outcome.what = "at any moment"
            process.pause(draw.random() * self.seconds)
            return
        outcome.what = f"after step {at}"
        process.wait_until(lambda: steps_logged(run) >= at)
        if kind == 1:
            outcome.what = f"in the first save after step {at}"
            process.wait_until(lambda: being_saved(run))
        process.pause(draw.random() * 0.02)

    def _end(self, process: Process, number: int, draw: random.Random, outcome: Outcome) -> None:
        """Send the signal, or close the terminal, and wait for the end."""
        running, began = not process.over(), time.monotonic()
        if outcome.fault == "closed terminal":
            process.close_terminal()
        else:
            process.send(number)
        outcome.asked_to_stop = outcome.timed = running and number != signal.SIGKILL
        if outcome.fault == "SIGINT twice":
            process.pause(draw.choice((0.2, ONE_REQUEST + 0.5)) * draw.random())
            if time.monotonic() - began > ONE_REQUEST and not process.over():
                outcome.asked_to_stop = outcome.timed = False  # but to exit at once
                outcome.what += ", the second one late"
            process.send(number)
        outcome.notes.append(f"status {process.wait()}")
        outcome.seconds = time.monotonic() - began if running else 0.0

    def _fill_disk(self, run: Path, log: Path, draw: random.Random, outcome: Outcome, disk: SmallDisk) -> None:
        process = self.launch(["train", str(self._recipe(outcome)), "--out", str(run)], log)
        at = draw.randrange(STEPS)
        process.wait_until(lambda: steps_logged(run) >= at)
        process.send(signal.SIGSTOP)  # so that the following happens at once, whatever the load
        disk.fill(draw.choice((0, 8192, self.size // 2)))
        if draw.random() < 0.5:
            outcome.what = f"after step {at}, until a save fails"
            process.send(signal.SIGCONT)
            process.wait_until(lambda: b"NOT saved" in log.read_bytes())
        else:
            outcome.what = f"after step {at}, and SIGTERM"
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
            process.wait()
        disk.free()
        outcome.notes.append(f"status {process.wait()}")
        outcome.ended_well = ended_well(run, saved=False)

    def _fail_fsyncs(self, run: Path, log: Path, draw: random.Random, outcome: Outcome) -> None:
        rank = draw.randrange(self.processes)
        first = draw.randrange(1, max(2, self.fsyncs[rank]))
        faults = FsyncFaults(range(first, first + draw.randint(1, 3)))
        outcome.what = f"calls {faults.failing.start} to {faults.failing.stop - 1}" + f" of rank {rank}" * (self.processes > 1)
        command = ["train", str(self._recipe(outcome)), "--out", str(run)]
        status = self.launch(command, log, faults=faults, faulty=rank).wait()
        if not faults.failed:
            outcome.notes.append("no fsync failed")
        outcome.notes.append(f"status {status}")
        outcome.ended_well = ended_well(run, saved=False)

    def _flip_byte(self, run: Path, log: Path, draw: random.Random, outcome: Outcome) -> None:
        process = self.launch(["train", str(self._recipe(outcome)), "--out", str(run)], log)
        at = draw.randrange(INTERVAL + 1, STEPS)  # there must be an older checkpoint to fall back to
        process.wait_until(lambda: steps_logged(run) >= at)
        self._end(process, signal.SIGTERM, draw, outcome)
        outcome.ended_well = ended_well(run, saved=True)
        if (place := newest(run)) is not None:
            outcome.what = f"{flip_byte(place, draw, self.damaged)} of {place.name}"

    def _finish(self, run: Path, log: Path, outcome: Outcome) -> None:
        """Resume until the run is finished, like a user who does not know what happened."""
        while True:
            done = (run / "checkpoints" / f"step-{STEPS:06d}").is_dir() and outcome.notes[-1] == "status 0"
            if done or outcome.starts >= _MOST_STARTS:
                outcome.survived = done
                return
            before, begun = steps_logged(run), (run / "config.toml").exists()
            outcome.starts += 1
            if outcome.starts == 2:
                outcome.unsaved = log.read_bytes().count(b"bardling: warning: the checkpoint of step")
            command = ["resume", str(run)] if begun else ["train", str(self._recipe(outcome)), "--out", str(run)]
            process = self.launch(command, log, outcome)
            outcome.notes.append(f"status {process.wait()}")
            if begun and process.status == 0:
                starts = json.loads((run / "environment.json").read_text())["starts"]
                outcome.lost = max(outcome.lost, before - starts[-1]["first_step"])

    def _compare(self, run: Path, outcome: Outcome) -> None:
        last = Path("checkpoints") / f"step-{STEPS:06d}" / "model.safetensors"
        still = self.compiled_still if outcome.fault == "signal in compilation" else self.still
        if outcome.survived:
            outcome.model_equal = (run / last).read_bytes() == (still / last).read_bytes()
            names = ("metrics.jsonl", "samples.jsonl")
            outcome.metrics_equal = all(records(run, name) == records(still, name) for name in names)
