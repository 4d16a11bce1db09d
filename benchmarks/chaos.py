"""Fault injection: do runs that are killed, out of disk space or damaged at random moments end equal to an undisturbed run?

    python benchmarks/chaos.py [--trials 100] [--seed 0] [--record]

Each trial trains a small model (2 layers, width 32, with dropout, validation and samples; 60 steps, a checkpoint every 10)
and injects one fault at a random moment; the faults take turns:

- SIGKILL: at any time between start and exit; in half of the trials while a checkpoint is being written;
- SIGTERM: likewise; the run saves and exits;
- disk full: the run's own small disk (a tmpfs) fills up. Either the run fails to save its next checkpoint, continues, gets
  space again and needs no help; or it is stopped (SIGTERM) while it cannot save, exits, and is resumed when there is space
  again;
- failing fsync: the kernel returns EIO for one to three consecutive `fsync` calls of the run (benchmarks/faults.py);
- flipped byte: the run is stopped, and one bit in one file of its latest checkpoint is changed.

A run that has ended is resumed with `bardling resume`, through the same command line code that a user calls, until it is
finished. Then `model.safetensors` of the last step must be bitwise equal to that of an undisturbed run, and so must
`metrics.jsonl` (except for timings) and `samples.jsonl`. Steps lost are logged steps that had to be repeated: those since the
latest checkpoint. That is at most one checkpoint interval plus the steps made while the next checkpoint was being written.
Since a save never starts before the previous one is finished, two intervals are an upper bound; the load of the machine
decides where below it a run ends up. Each failed save that the run reported allows for one more interval.

For speed, processes are forked from this one, which has imported PyTorch but computed nothing and has one thread; otherwise
100 trials would spend ten minutes on imports. From then on each is an independent process, and everything tested happens in
it. The moments are drawn from the seed, but how far a process has come by then depends on the machine, so a trial cannot be
repeated exactly. Linux only; without permission to mount, disk-full trials are skipped with a message.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._dynamo  # otherwise each process would import these in its first step

import bardling.cli.resume  # these too
import bardling.cli.train
import bardling.training.run  # noqa: F401
from bardling.cli.main import main as bardling_main
from bardling.monitor.records import TIMING_FIELDS
from faults import FsyncFaults, SmallDisk, flip_byte

STEPS, INTERVAL = 60, 10
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
FAULTS = ("SIGKILL", "SIGTERM", "disk full", "failing fsync", "flipped byte")
RESULTS = Path(__file__).parent / "results" / "chaos.md"
_MOST_STARTS = 5
_PATIENCE = 120.0  # seconds


class Process:
    """A training process, forked; its output goes to `log`."""

    def __init__(self, arguments: list[str], log: Path, faults: FsyncFaults | None = None) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(arguments, log, faults)
        self.status: int | None = None
        if faults is not None:
            faults.begin_parent()

    def over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Poll until the condition holds; False if the process exits first."""
        end = time.monotonic() + _PATIENCE
        while not condition():
            if self.over():
                return False
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"no progress for {_PATIENCE:.0f} s: {self.log.read_text()[-500:]}")
            time.sleep(0.0003)
        return True

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def wait(self) -> int:
        self.wait_until(self.over)
        assert self.status is not None
        return self.status


def _child(arguments: list[str], log: Path, faults: FsyncFaults | None) -> None:
    """Body of the forked process; never returns."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        if faults is not None:
            faults.begin_child()
        torch.set_num_threads(1)
        try:
            bardling_main(arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        for thread in threading.enumerate():  # as Python does at exit
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except BaseException:  # noqa: BLE001  a fork must not go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@dataclass
class Outcome:
    """How one trial ended."""

    fault: str
    what: str = ""
    starts: int = 1
    survived: bool = False
    model_equal: bool = False
    metrics_equal: bool = False
    lost: int = 0
    unsaved: int = 0  # failed saves that the run reported
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.model_equal and self.metrics_equal

    @property
    def most_lost(self) -> int:
        """Upper bound on the steps that may be lost, whatever the load of the machine."""
        return (2 + self.unsaved) * INTERVAL


def records(run: Path, name: str) -> list[dict[str, object]]:
    """The records of a run without timings; an incomplete last line is ignored."""
    path = run / name
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS} for line in lines]


def steps_logged(run: Path) -> int:
    """The last logged step, determined cheaply: every step has a line."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        return int(json.loads((run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return 0


def being_saved(run: Path) -> bool:
    """Whether a checkpoint is being written and already has files."""
    try:
        return any(run.glob("checkpoints/.tmp-*/*"))
    except FileNotFoundError:  # it has just been completed
        return False


def newest(run: Path) -> Path | None:
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


class Trials:
    """What all trials share: the recipe, the undisturbed run and its duration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words, text = random.Random(0), folder / "text.txt"
        names = ["king", "queen", "rose", "thorn", "night", "day", "love", "war", "sea", "storm"]
        text.write_text("".join("The {} and the {} met {} times.\n".format(*words.sample(names, 2), n % 7) for n in range(900)))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE.replace("@TEXT@", str(text)))
        os.environ["BARDLING_CACHE"] = str(folder / "cache")
        self.disks = SmallDisk.possible(folder)
        for _ in range(2):  # the first run prepares the data
            self.still = folder / "undisturbed"
            shutil.rmtree(self.still, ignore_errors=True)
            counted = FsyncFaults(range(0))
            began = time.monotonic()
            process = Process(["train", str(self.recipe), "--out", str(self.still)], folder / "undisturbed.log", counted)
            if process.wait() != 0:
                raise SystemExit((folder / "undisturbed.log").read_text())
            self.seconds, self.fsyncs = time.monotonic() - began, counted.count
        self.size = sum(path.stat().st_size for path in (self.still / "checkpoints" / f"step-{STEPS:06d}").iterdir())
        if not self.fsyncs:
            raise SystemExit("fsync interception saw no calls, so it cannot make one fail")

    def run(self, number: int, fault: str, draw: random.Random) -> Outcome:
        """One trial."""
        outcome = Outcome(fault)
        place = self.folder / f"trial{number}"
        place.mkdir()
        log = self.folder / f"trial{number}.log"
        disk = SmallDisk(place, 64) if fault == "disk full" else contextlib.nullcontext()
        with disk:
            run = place / "run"
            try:
                self._disturb(run, log, draw, outcome, disk if isinstance(disk, SmallDisk) else None)
                self._finish(run, log, outcome)
                self._compare(run, outcome)
            except TimeoutError as error:
                outcome.notes.append(str(error))
        shutil.rmtree(place, ignore_errors=True)
        if outcome.equal:
            log.unlink()
        return outcome

    def _disturb(self, run: Path, log: Path, draw: random.Random, outcome: Outcome, disk: SmallDisk | None) -> None:
        first = draw.randrange(1, max(2, self.fsyncs))
        faults = FsyncFaults(range(first, first + draw.randint(1, 3))) if outcome.fault == "failing fsync" else None
        process = Process(["train", str(self.recipe), "--out", str(run)], log, faults)
        at = draw.randrange(STEPS)
        match outcome.fault:
            case "SIGKILL" | "SIGTERM":
                number = getattr(signal, outcome.fault)
                kind = draw.randrange(4)
                if kind == 0:  # any moment, including start-up
                    outcome.what = "at any moment"
                    time.sleep(draw.random() * self.seconds)
                else:
                    process.wait_until(lambda: steps_logged(run) >= at)
                    outcome.what = f"after step {at}"
                    if kind == 1:
                        outcome.what = f"in the first save after step {at}"
                        process.wait_until(lambda: being_saved(run))
                    time.sleep(draw.random() * 0.02)
                process.send(number)
            case "flipped byte":
                at = draw.randrange(INTERVAL + 1, STEPS)  # there must be an older checkpoint to fall back to
                process.wait_until(lambda: steps_logged(run) >= at)
                process.send(signal.SIGTERM)
                process.wait()
                if (place := newest(run)) is not None:
                    outcome.what = f"{flip_byte(place, draw)} of {place.name}"
            case "disk full":
                assert disk is not None
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
            case _:
                outcome.what = f"calls {faults.failing.start} to {faults.failing.stop - 1}" if faults else ""
        process.wait()
        if faults is not None and not faults.failed:
            outcome.notes.append("no fsync failed")
        outcome.notes.append(f"status {process.status}")

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
            process = Process(["resume", str(run)] if begun else ["train", str(self.recipe), "--out", str(run)], log)
            outcome.notes.append(f"status {process.wait()}")
            if begun and process.status == 0:
                starts = json.loads((run / "environment.json").read_text())["starts"]
                outcome.lost = max(outcome.lost, before - starts[-1]["first_step"])

    def _compare(self, run: Path, outcome: Outcome) -> None:
        last = Path("checkpoints") / f"step-{STEPS:06d}" / "model.safetensors"
        if outcome.survived:
            outcome.model_equal = (run / last).read_bytes() == (self.still / last).read_bytes()
            names = ("metrics.jsonl", "samples.jsonl")
            outcome.metrics_equal = all(records(run, name) == records(self.still, name) for name in names)


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table: a row per fault, and a total."""
    rows = ["| fault | trials | survived | without a restart | bitwise equal | steps lost (max) |", "|---|--:|--:|--:|--:|--:|"]
    for fault in (*FAULTS, "all"):
        some = [outcome for outcome in outcomes if fault in (outcome.fault, "all")]
        if some:
            alone, equal = sum(o.survived and o.starts == 1 for o in some), sum(o.equal for o in some)
            survived, lost = sum(o.survived for o in some), max(o.lost for o in some)
            rows.append(f"| {fault} | {len(some)} | {survived} | {alone} | {equal} | {lost} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"append the table to {RESULTS.name}")
    options = parser.parse_args()
    if not FsyncFaults.possible():
        parser.error("needs Linux on x86_64 or aarch64")
    assert len(os.listdir("/proc/self/task")) == 1, "there must be no other threads, because a fork copies only one"  # noqa: PTH208
    began, outcomes = time.time(), []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=memory) as name:
        trials = Trials(Path(name))
        faults = [fault for fault in FAULTS if trials.disks or fault != "disk full"]
        if not trials.disks:
            print("no permission to mount a small disk: disk-full trials are skipped")
        print(f"undisturbed: {trials.seconds:.1f} s, {trials.fsyncs} fsync calls", flush=True)
        for number in range(options.trials):
            draw = random.Random(f"{options.seed}:{number}")
            outcome = trials.run(number, faults[number % len(faults)], draw)
            outcomes.append(outcome)
            good = "equal" if outcome.equal else "DIFFERENT" if outcome.survived else "LOST"
            good += "" if outcome.lost <= outcome.most_lost else ", TOO MUCH REPEATED"
            notes = ", ".join(outcome.notes)
            print(f"{number:3d} {outcome.fault:13s} {outcome.what:40s} {good}, {outcome.lost} steps lost, {notes}", flush=True)
            if not outcome.equal:
                print("    " + "\n    ".join((Path(name) / f"trial{number}.log").read_text().splitlines()[-12:]))
    lost = max(outcome.lost for outcome in outcomes)
    survived, equal = sum(o.survived for o in outcomes), sum(o.equal for o in outcomes)
    print(f"\n{table(outcomes)}\n")
    took = time.time() - began
    print(f"trials {len(outcomes)}, survived {survived}, bitwise equal {equal}, steps lost (max) {lost}; {took:.0f} s")
    if options.record:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(
                f"\n## {time.strftime('%Y-%m-%d')}, seed {options.seed}, commit {commit.stdout.strip()}\n\n"
                f"`python benchmarks/chaos.py --trials {options.trials} --seed {options.seed}`: {STEPS} steps, "
                f"a checkpoint every {INTERVAL}; {platform.machine()}, Linux {platform.release()}, "
                f"Python {platform.python_version()}, torch {torch.__version__}; {took:.0f} s.\n\n{table(outcomes)}\n"
            )
    return 0 if equal == len(outcomes) and all(o.lost <= o.most_lost for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
