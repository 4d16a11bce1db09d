"""Fuzzing: malformed files through every loader must raise only `UserError`, quickly, in little memory, and execute nothing.

    python benchmarks/fuzz.py --cases 20000 --seed 0 --record     # the table, appended to benchmarks/results/fuzz.md
    python benchmarks/fuzz.py --target "nanoGPT ckpt.pt" --case 17      # repeat one case, with its traceback

Method. For each target (benchmarks/fuzz_targets.py, fuzz_text_targets.py), a separate process first loads valid files, which
triggers late imports, and then malformed ones (benchmarks/malformed_files.py), one after the other. A case passes if the loader
returns or raises `UserError` with a message, within 2 s and 1 GiB. Checked are:

- execution and writing: an audit hook stops and reports every command, every execution of code from data, every network
  connection, and every file written, created or removed outside the case's folder. A canary folder must not be created;
- memory: the address space is limited to its size at the start of the case plus 1 GiB; the growth of resident memory is
  measured;
- time: the CPU time of the case (so that a busy machine does not fail it), and 10 s of wall-clock time, after which the process
  is killed. A crash, an endless loop in a library or a wait without end therefore counts as a failure of the case.

Before that come self-tests: loaders that each do one forbidden thing, all of which must be caught.

Limits: Linux (memory is read from /proc). Cases are drawn at random from a seed, not guided by coverage.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # imported once here, not in each process

from bardling.errors import UserError
from fuzz_audit import AuditHook
from fuzz_self_test import SELF_TESTS
from fuzz_targets import TARGETS as BINARY_TARGETS
from fuzz_targets import Target, change
from fuzz_text_targets import TEXT_TARGETS

TARGETS = (*BINARY_TARGETS, *TEXT_TARGETS)
SECONDS, MEMORY, CLOCK = 2.0, 1 << 30, 10.0
_START = 300.0  # seconds allowed for imports before the first case
RESULTS = Path(__file__).parent / "results" / "fuzz.md"


def _status(key: str) -> int:
    with open("/proc/self/status") as file:  # noqa: PTH123  as cheap as it gets: twice a case
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def run_case(
    target: Target, number: int, seed: int, valid: Path, place: Path, audit: AuditHook, canary: Path
) -> dict[str, Any]:
    """Load one malformed file with one loader."""
    draw = random.Random(f"{seed}:{target.name}:{number}")
    if target.writes or not place.exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(valid, place)
    how = change(place, target, draw, canary) if number else "unchanged"
    changed = how.partition(":")[0]
    audit.inside, audit.seen = str(place.resolve()), []
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    memory, used, began = _status("VmRSS"), time.process_time(), time.perf_counter()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    fault = ""
    outcome = "loaded"
    trace = ""
    audit.armed = True
    try:
        target.load(place)
    except UserError as error:
        outcome = "refused"
        if not str(error).strip():
            fault = "an error without a message"
    except BaseException as error:  # noqa: BLE001  any exception is a failure of the case
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bardling/" in frame.filename]
        where = f" at {frames[-1].filename.partition('/bardling/')[2]}:{frames[-1].lineno}" if frames else ""
        fault, trace = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}{where}", traceback.format_exc()
    finally:
        audit.armed = False
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seconds, clock = time.process_time() - used, time.perf_counter() - began
    grown = max(0, _status("VmHWM") - memory)
    if audit.seen:
        fault = f"forbidden operation: {audit.seen[0]}"
    elif canary.exists():
        fault = "the canary was created: something was executed"
        canary.rmdir()
    elif not fault and seconds > SECONDS:
        fault = f"took {seconds:.1f} s"
    elif not fault and grown > MEMORY:
        fault = f"took {grown >> 20} MiB"
    if number == 0 and outcome != "loaded" and not fault:
        fault = "the valid files were rejected"
    if not target.writes and number:
        _restore(place / changed, valid / changed)
        if target.seal is not None:
            for manifest in valid.rglob("manifest.json"):
                _restore(place / manifest.relative_to(valid), manifest)
    return {
        "case": number,
        "outcome": outcome,
        "fault": fault,
        "how": how,
        "seconds": seconds,
        "clock": clock,
        "bytes": grown,
        "trace": trace,
    }


def _restore(path: Path, valid: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.copy2(valid, path)


@dataclass
class Tally:
    """Results of one target."""

    name: str
    cases: int = 0
    loaded: int = 0
    refused: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    bytes: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: dict[str, Any]) -> None:
        self.cases += found["case"] > 0  # case 0 is the unchanged file
        if found["fault"]:
            self.faults.append(found)
        elif found["case"]:
            self.loaded += found["outcome"] == "loaded"
            self.refused += found["outcome"] == "refused"
        self.seconds, self.clock, self.bytes = (
            max(self.seconds, found["seconds"]), max(self.clock, found["clock"]), max(self.bytes, found["bytes"]),
        ) if found["case"] else (self.seconds, self.clock, self.bytes)  # fmt: skip


def _child(target: Target, numbers: range, seed: int, valid: Path, pipe: int) -> None:
    """The process of one target: writes a JSON line before ("begin") and after each case."""
    place, canary = valid.parent / "place", valid.parent / "canary"
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.environ["FUZZ_CANARY"] = str(canary)
    torch.set_num_threads(1)
    audit = AuditHook()
    with os.fdopen(pipe, "w") as out:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(UserError):  # triggers late imports
            if not target.name.startswith("self-test:"):
                shutil.copytree(valid, place)
                target.load(place)
                shutil.rmtree(place)
        for number in numbers:
            print(json.dumps({"begin": number}), file=out, flush=True)
            print(json.dumps(run_case(target, number, seed, valid, place, audit, canary)), file=out, flush=True)


def fork(function: Any, *arguments: Any) -> int:
    """Run a function in a forked process; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
    except BaseException:  # noqa: BLE001  a fork must not go on as its parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_target(target: Target, numbers: range, seed: int, folder: Path) -> Tally:
    """Run all cases of a target; if its process dies or hangs, the case fails and another process continues."""
    tally, valid, place = Tally(target.name), folder / "valid", folder / "place"
    if not valid.exists():  # another target may have created the same files
        place.mkdir(parents=True)
        _, status = os.waitpid(fork(target.make, place), 0)  # here, because a run records the path of its data
        if status:
            raise SystemExit(f"{target.name}: the valid files cannot be created")
        place.rename(valid)
    following = numbers
    while following:
        reader, writer = os.pipe()
        pid = fork(_child, target, following, seed, valid, writer)
        os.close(writer)
        at, done, hung, started = following[0], None, False, False
        with os.fdopen(reader, "rb", buffering=0) as lines:
            rest = b""
            while True:
                if not select.select([lines], [], [], CLOCK if started else _START)[0]:
                    hung = True
                    os.kill(pid, signal.SIGKILL)
                    break
                piece = lines.read(1 << 16)
                if not piece:
                    break
                started = True
                *whole, rest = (rest + piece).split(b"\n")
                for found in map(json.loads, whole):
                    if "begin" in found:
                        at, done = found["begin"], None
                    else:
                        tally.add(found)
                        done = found["case"]
        _, status = os.waitpid(pid, 0)
        if done != at:
            fault = f"still running after {CLOCK:.0f} s" if hung else f"the process died (status {status})"
            tally.add(
                {
                    "case": at,
                    "outcome": "",
                    "fault": fault,
                    "how": "?",
                    "seconds": CLOCK,
                    "clock": CLOCK,
                    "bytes": 0,
                    "trace": "",
                }
            )
        elif status:
            raise SystemExit(f"{target.name}: the fuzzer failed after case {at}")
        following = following[following.index(at) + 1 :]
    return tally


def run_self_tests(folder: Path) -> tuple[int, int]:
    """Run the self-tests; returns how many forbidden operations are caught, and their number."""
    global CLOCK
    before, CLOCK = CLOCK, 2.0
    caught = 0
    for self_test in SELF_TESTS:
        tally = run_target(self_test, range(1, 2), 0, folder / "self-tests")
        caught += len(tally.faults) == 1
        if not tally.faults:
            print(f"NOT CAUGHT: {self_test.name}")
    CLOCK = before
    return caught, len(SELF_TESTS)


def table(tallies: list[Tally]) -> str:
    """Markdown."""
    rows = [
        "| target | cases | rejected with UserError | loaded | worst time (CPU) | worst memory | violations |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    total = Tally("all")
    for tally in tallies:
        for name in ("cases", "loaded", "refused"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.seconds, total.bytes, total.faults = (
            max(total.seconds, tally.seconds),
            max(total.bytes, tally.bytes),
            total.faults + tally.faults,
        )
    for tally in [*tallies, total]:
        rows.append(
            f"| {tally.name} | {tally.cases:,} | {tally.refused:,} | {tally.loaded:,} | {tally.seconds:.2f} s | "
            f"{tally.bytes / 2**20:,.0f} MiB | {len(tally.faults)} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="run only this target")
    parser.add_argument("--kind", choices=("text", "binary"), help="run only the targets of fuzz_text_targets, or the others")
    parser.add_argument("--case", type=int, help="run only this case of the target, and print its traceback")
    parser.add_argument("--record", action="store_true", help=f"append the table to {RESULTS.name}")
    options = parser.parse_args()
    kinds = {"text": TEXT_TARGETS, "binary": BINARY_TARGETS, None: TARGETS}
    targets = [target for target in kinds[options.kind] if options.target in (None, target.name)]
    if not targets:
        parser.error(f"unknown target; choose from {', '.join(target.name for target in TARGETS)}")
    shares = sum(target.share for target in targets)
    began, tallies = time.time(), []
    # In memory if possible: thousands of small files are created.
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        caught, self_tests = run_self_tests(folder)
        print(f"self-tests: {caught} of {self_tests} caught", flush=True)
        for target in targets:
            count = -(-options.cases * target.share // shares)
            numbers = range(count + 1) if options.case is None else range(options.case, options.case + 1)
            tally = run_target(target, numbers, options.seed, folder / target.make.__name__)
            tallies.append(tally)
            print(f"{target.name}: {tally.cases} cases, {len(tally.faults)} violations", flush=True)
            shown: set[str] = set()
            for found in tally.faults:
                place = found["fault"].rpartition(" at ")[2]
                if place not in shown and len(shown) < 12:
                    print(f"  case {found['case']} ({found['how']}): {found['fault']}")
                    shown.add(place)
                    if options.case is not None:
                        print(found["trace"])
    print(f"\n{table(tallies)}\n\n{time.time() - began:.0f} s, seed {options.seed}")
    faults = sum(len(tally.faults) for tally in tallies)
    if options.record:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(
                f"\n## {time.strftime('%Y-%m-%d')}, seed {options.seed}, commit {commit}\n\n"
                f"`python benchmarks/fuzz.py --cases {options.cases} --seed {options.seed}`; {platform.machine()}, Linux, "
                f"Python {platform.python_version()}, torch {torch.__version__}; {time.time() - began:.0f} s; "
                f"self-tests: {caught} of {self_tests} caught.\n\n{table(tallies)}\n"
            )
    return 0 if caught == self_tests and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
