"""Fault injection: do runs that are killed, out of disk space or damaged at random moments end equal to an undisturbed run?

    python benchmarks/chaos.py [--trials 200] [--first 0] [--seed 0] [--without FAULT ...] [--ends-only] [--record]

Each trial trains a small model (2 layers, width 32, with dropout, validation and samples; 60 steps, a checkpoint every 10)
and injects one fault at a random moment; the faults take turns:

- SIGKILL: at any time between start and exit; in half of the trials while a checkpoint is being written;
- SIGTERM, SIGHUP: likewise; the run saves and exits;
- SIGINT twice: likewise, the second one up to a fifth of a second later, or after more than a second, when it ends the run
  without saving;
- closed terminal: the run's own terminal (a pty) is closed, and the kernel sends SIGHUP;
- a signal (SIGTERM, SIGINT or SIGHUP) during a phase: while one of two processes waits for the other (rendezvous), while the
  compiler runs, with its cache or without, in validation, and while a checkpoint is being written;
- disk full: the run's own small disk (a tmpfs) fills up. Either the run fails to save its next checkpoint, continues, gets
  space again and needs no help; or it is stopped (SIGTERM) while it cannot save, exits, and is resumed when there is space
  again;
- failing fsync: the kernel returns EIO for one to three consecutive `fsync` calls of the run (benchmarks/faults.py);
- flipped byte: the run is stopped, and one bit in one file of its latest checkpoint is changed.

A trial ends well if its latest checkpoint is then valid, or if there is none because nothing could be saved. After a signal
that asks the run to save, there must be one, unless the run had not begun and its folder does not exist; the exit status must
be 128 + the signal's number, unless the program had not begun to handle signals; and all that within 5 seconds (`--limit`).

A run that has ended is resumed with `bardling resume`, through the same command line code that a user calls, until it is
finished. Then `model.safetensors` of the last step must be bitwise equal to that of an undisturbed run, and so must
`metrics.jsonl` (except for timings) and `samples.jsonl`. Steps lost are logged steps that had to be repeated: those since the
latest checkpoint. That is at most one checkpoint interval plus the steps made while the next checkpoint was being written.
Since a save never starts before the previous one is finished, two intervals are an upper bound; the load of the machine
decides where below it a run ends up. Each failed save that the run reported allows for one more interval.

For speed, processes are forked from this one, which has imported PyTorch but computed nothing and has one thread; otherwise
200 trials would spend twenty minutes on imports. From then on each is an independent process (`trial_process.py`), and
everything tested happens in it. The moments are drawn from the seed, but how far a process has come by then depends on the
machine, so a trial cannot be repeated exactly.

Linux only; without permission to mount, disk-full trials are skipped with a message.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._dynamo  # otherwise each process would import these in its first step

import bardling.cli.resume  # these too
import bardling.cli.train
import bardling.training.run  # noqa: F401
from bardling.errors import ONE_REQUEST
from faults import FsyncFaults, SmallDisk, flip_byte
from trial_outcome import INTERVAL, Outcome, being_saved, describe, ended_well, newest, records, steps_logged, table
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
RESULTS = Path(__file__).parent / "results" / "chaos.md"
_MOST_STARTS = 5


class Trials:
    """What all trials share: the recipe, the undisturbed runs and their duration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words, text = random.Random(0), folder / "text.txt"
        names = ["king", "queen", "rose", "thorn", "night", "day", "love", "war", "sea", "storm"]
        text.write_text("".join("The {} and the {} met {} times.\n".format(*words.sample(names, 2), n % 7) for n in range(900)))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE.replace("@TEXT@", str(text)))
        self.compiled_recipe = folder / "compiled.toml"
        self.compiled_recipe.write_text(self.recipe.read_text().replace('compile = "off"', 'compile = "on"'))
        os.environ["BARDLING_CACHE"] = str(folder / "cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        self.disks = SmallDisk.possible(folder)
        self.still, self.compiled_still = folder / "undisturbed", folder / "undisturbed-compiled"
        for _ in range(2):  # the first run prepares the data
            shutil.rmtree(self.still, ignore_errors=True)
            counted = FsyncFaults(range(0))
            self.seconds = self._undisturbed(self.recipe, self.still, counted)
            self.fsyncs = counted.count
        self.size = sum(path.stat().st_size for path in (self.still / "checkpoints" / f"step-{STEPS:06d}").iterdir())
        if not self.fsyncs:
            raise SystemExit("fsync interception saw no calls, so it cannot make one fail")
        self.compiling = 0.0  # how long the compiler takes (s), once it has run to its end

    def _undisturbed(self, recipe: Path, run: Path, counted: FsyncFaults | None = None) -> float:
        """Train without a fault; returns the duration (s)."""
        began, log = time.monotonic(), run.with_suffix(".log")
        process = Process(["train", str(recipe), "--out", str(run)], log, faults=counted)
        if recipe == self.compiled_recipe:
            process.wait_until(lambda: COMPILING in log.read_bytes())
            begin = time.monotonic()
            process.wait_until(lambda: steps_logged(run) > 0)
            self.compiling = time.monotonic() - begin
        if process.wait() != 0:
            raise SystemExit(log.read_text())
        return time.monotonic() - began

    def run(self, number: int, outcome: Outcome, draw: random.Random) -> None:
        """One trial."""
        fault = outcome.fault
        if fault == "signal in compilation" and not self.compiling and outcome.resumed:
            self._undisturbed(self.compiled_recipe, self.compiled_still)
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

    def _start(self, run: Path, log: Path, draw: random.Random, outcome: Outcome, phase: str) -> Process:
        recipe, environment = self.recipe, dict[str, str]()
        if phase == "compilation":
            recipe = self.compiled_recipe
            if draw.random() < 0.25:  # in an empty cache, it compiles as for the first time
                environment["TORCHINDUCTOR_CACHE_DIR"] = str(run.parent / "compiled")
        elif phase == "rendezvous":
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            outcome.what = f"as rank {(rank := draw.randrange(2))}"
            environment |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        announced = phase if phase in PHASES else ""
        terminal, command = outcome.fault == "closed terminal", ["train", str(recipe), "--out", str(run)]
        return Process(command, log, environment=environment, phase=announced, terminal=terminal)

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
        outcome.asked_to_stop = running and number != signal.SIGKILL
        if outcome.fault == "SIGINT twice":
            process.pause(draw.choice((0.2, ONE_REQUEST + 0.5)) * draw.random())
            if time.monotonic() - began > ONE_REQUEST and not process.over():
                outcome.asked_to_stop = False  # but to exit at once
                outcome.what += ", the second one late"
            process.send(number)
        outcome.notes.append(f"status {process.wait()}")
        outcome.seconds = time.monotonic() - began if running else 0.0

    def _fill_disk(self, run: Path, log: Path, draw: random.Random, outcome: Outcome, disk: SmallDisk) -> None:
        process = Process(["train", str(self.recipe), "--out", str(run)], log)
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
        first = draw.randrange(1, max(2, self.fsyncs))
        faults = FsyncFaults(range(first, first + draw.randint(1, 3)))
        outcome.what = f"calls {faults.failing.start} to {faults.failing.stop - 1}"
        status = Process(["train", str(self.recipe), "--out", str(run)], log, faults=faults).wait()
        if not faults.failed:
            outcome.notes.append("no fsync failed")
        outcome.notes.append(f"status {status}")
        outcome.ended_well = ended_well(run, saved=False)

    def _flip_byte(self, run: Path, log: Path, draw: random.Random, outcome: Outcome) -> None:
        process = Process(["train", str(self.recipe), "--out", str(run)], log)
        at = draw.randrange(INTERVAL + 1, STEPS)  # there must be an older checkpoint to fall back to
        process.wait_until(lambda: steps_logged(run) >= at)
        self._end(process, signal.SIGTERM, draw, outcome)
        outcome.ended_well = ended_well(run, saved=True)
        if (place := newest(run)) is not None:
            outcome.what = f"{flip_byte(place, draw)} of {place.name}"

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
            recipe = self.compiled_recipe if outcome.fault == "signal in compilation" else self.recipe
            process = Process(["resume", str(run)] if begun else ["train", str(recipe), "--out", str(run)], log)
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


def record(options: argparse.Namespace, outcomes: list[Outcome], took: float) -> None:
    """Append the table to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    RESULTS.parent.mkdir(exist_ok=True)
    first = f" --first {options.first}" * bool(options.first) + " --ends-only" * options.ends_only
    first += "".join(f" --without '{fault}'" for fault in options.without)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(
            f"\n## {time.strftime('%Y-%m-%d')}, seed {options.seed}, commit {commit.stdout.strip()}\n\n"
            f"`python benchmarks/chaos.py --trials {len(outcomes)}{first} --seed {options.seed}`: {STEPS} steps, "
            f"a checkpoint every {INTERVAL}; {platform.machine()}, Linux {platform.release()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}; {took:.0f} s, load {os.getloadavg()[2]:.0f} on "
            f"{os.cpu_count()} cores.\n\n{table(outcomes, FAULTS)}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to run them in pieces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="+", default=[], choices=FAULTS, metavar="FAULT", help="faults to leave out")
    parser.add_argument("--ends-only", action="store_true", help="look at the end of a disturbed run, and do not resume it")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a process may take to stop")
    parser.add_argument("--record", action="store_true", help=f"append the table to {RESULTS.name}")
    options = parser.parse_args()
    if not FsyncFaults.possible():
        parser.error("needs Linux on x86_64 or aarch64")
    assert len(os.listdir("/proc/self/task")) == 1, "there must be no other threads, because a fork copies only one"  # noqa: PTH208
    began, outcomes = time.time(), []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=memory) as name:
        trials = Trials(Path(name))
        turns = [fault for fault in TURNS if fault not in options.without and (trials.disks or fault != "disk full")]
        if not trials.disks:
            print("no permission to mount a small disk: disk-full trials are skipped")
        print(f"undisturbed: {trials.seconds:.1f} s, {trials.fsyncs} fsync calls", flush=True)
        for number in range(options.first, options.first + options.trials):
            draw = random.Random(f"{options.seed}:{number}")
            outcome = Outcome(turns[number % len(turns)], resumed=not options.ends_only, limit=options.limit)
            try:
                trials.run(number, outcome, draw)
            except KeyboardInterrupt:
                break
            outcomes.append(outcome)
            print(describe(number, outcome), flush=True)
            if not outcome.good:
                print(
                    "    " + "\n    ".join((Path(name) / f"trial{number}.log").read_text(errors="replace").splitlines()[-12:])
                )
    lost = max((outcome.lost for outcome in outcomes), default=0)
    survived, equal = sum(o.survived for o in outcomes), sum(o.equal for o in outcomes)
    well = sum(o.ended_well and o.in_time for o in outcomes)
    print(f"\n{table(outcomes, FAULTS)}\n")
    took = time.time() - began
    figures = f"trials {len(outcomes)}, ended well {well}, survived {survived}, bitwise equal {equal}, steps lost (max) {lost}"
    print(f"{figures}; {took:.0f} s")
    if options.record:
        record(options, outcomes, took)
    return 0 if all(o.good for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
