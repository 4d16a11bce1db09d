"""Fault injection: do runs that are killed, out of disk space or damaged at random moments end equal to an undisturbed run?

    python benchmarks/chaos.py [--trials 200] [--first 0] [--seed 0] [--without FAULT ...] [--ends-only] [--record]
    python benchmarks/chaos.py --layout shard [--trials 50] ...

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

With `--layout shard`, a run has two processes that hold shards (`sharded_trials.py`). A signal (SIGKILL too) reaches one of
them or both, an `fsync` fails in one of them, and a bit changes in the part that one of them wrote. Both must be gone within
the limit; after SIGKILL to one of them, within `rank_timeout` more. There is no launcher that would end them.

For speed, processes are forked from this one, which has imported PyTorch but computed nothing and has one thread; otherwise
200 trials would spend twenty minutes on imports. From then on each is an independent process (`trial_process.py`), and
everything tested happens in it. The moments are drawn from the seed, but how far a process has come by then depends on the
machine, so a trial cannot be repeated exactly.

Linux only; without permission to mount, disk-full trials are skipped with a message.
"""

import argparse
import os
import platform
import random
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
from faults import FsyncFaults
from sharded_trials import ShardedTrials
from trial_outcome import INTERVAL, Outcome, describe, table
from trial_runs import STEPS, Trials

RESULTS = Path(__file__).parent / "results" / "chaos.md"
LAYOUTS = {"one": Trials, "shard": ShardedTrials}


def record(options: argparse.Namespace, outcomes: list[Outcome], kind: type[Trials], took: float) -> None:
    """Append the table to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    RESULTS.parent.mkdir(exist_ok=True)
    first = f" --layout {options.layout}" * (options.layout != "one")
    first += f" --first {options.first}" * bool(options.first) + " --ends-only" * options.ends_only
    first += "".join(f" --without '{fault}'" for fault in options.without)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(
            f"\n## {time.strftime('%Y-%m-%d')}, seed {options.seed}, commit {commit.stdout.strip()}\n\n"
            f"`python benchmarks/chaos.py --trials {len(outcomes)}{first} --seed {options.seed}`: {STEPS} steps, "
            f"a checkpoint every {INTERVAL}; {platform.machine()}, Linux {platform.release()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}; {took:.0f} s, load {os.getloadavg()[2]:.0f} on "
            f"{os.cpu_count()} cores.\n\n{table(outcomes, kind.faults, kind.equality)}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="one", help="of the run: one process, or two that hold shards")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to run them in pieces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="+", default=[], metavar="FAULT", help="faults to leave out")
    parser.add_argument("--ends-only", action="store_true", help="look at the end of a disturbed run, and do not resume it")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a process may take to stop")
    parser.add_argument("--record", action="store_true", help=f"append the table to {RESULTS.name}")
    options = parser.parse_args()
    kind = LAYOUTS[options.layout]
    if unknown := set(options.without) - set(kind.faults):
        parser.error(f"--without {', '.join(unknown)}: choose from {', '.join(kind.faults)}")
    if not FsyncFaults.possible():
        parser.error("needs Linux on x86_64 or aarch64")
    assert len(os.listdir("/proc/self/task")) == 1, "there must be no other threads, because a fork copies only one"  # noqa: PTH208
    began, outcomes = time.time(), []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=memory) as name:
        trials = kind(Path(name))
        turns = [fault for fault in kind.turns if fault not in options.without and (trials.disks or fault != "disk full")]
        if not trials.disks:
            print("no permission to mount a small disk: disk-full trials are skipped")
        print(f"undisturbed: {trials.seconds:.1f} s, {sum(trials.fsyncs.values())} fsync calls", flush=True)
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
    print(f"\n{table(outcomes, kind.faults, kind.equality)}\n")
    took = time.time() - began
    figures = f"trials {len(outcomes)}, ended well {well}, survived {survived}, {kind.equality} {equal}"
    print(f"{figures}, steps lost (max) {lost}; {took:.0f} s")
    if options.record:
        record(options, outcomes, kind, took)
    return 0 if all(o.good for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
