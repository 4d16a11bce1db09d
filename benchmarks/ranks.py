"""Kill or stop one of two processes at a random moment, repeatedly: does the run end equal to an undisturbed one?

    python benchmarks/ranks.py [--layout fsdp] [--trials 20] [--seed 0] [--rank-timeout 6]

Each trial starts a small run with two processes (gloo), which copy the model (DDP) or hold shards of it (FSDP2), under
`torchrun --max-restarts`, waits for a random step, and sends SIGKILL and SIGSTOP, alternating between trials, to a random one
of them. torchrun restarts both, and the run continues from its last checkpoint. A trial passes if torchrun exits with status 0,
one line names the correct rank, and all losses and the final weights are bitwise those of the undisturbed run. Prints a line
per trial and `N of N`; the exit status is 1 if a trial fails.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

STEPS = 200
LATEST = 60  # the signal is sent by this step, which leaves enough steps if it is late
RECIPE = """
device = "cpu"
precision = "float32"
compile = "off"
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
[data]
source = "{text}"
tokenizer = "char"
[optim]
warmup_steps = 5
[train]
steps = {steps}
batch_size = 8
micro_batch = 2
log_every = 1
rank_timeout = {timeout}
[eval]
every = 20
windows = 8
[checkpoint]
every = 5
[parallel]
layout = "{layout}"
"""


@dataclass(frozen=True)
class Outcome:
    """Result of one torchrun job."""

    status: int
    output: str
    seconds: float | None  # from the signal to the message; None without a message


def launch(recipe: Path, out: Path, restarts: int, log: Path) -> subprocess.Popen[bytes]:
    """Start two processes under torchrun, with their output in `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "-m", "bardling", "train", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def workers(agent: int) -> list[int]:
    """The processes started by torchrun, by rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                environment = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError, ValueError):
                continue  # it has just exited
            if parent == agent:
                rank = next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)
                if rank is not None:
                    found.append((rank, int(entry.name)))
    return [pid for _, pid in sorted(found)]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def weights(run: Path) -> dict[str, bytes]:
    """The files of the final weights: one, or one of each process."""
    return {path.name: path.read_bytes() for path in (run / f"checkpoints/step-{STEPS:06d}").glob("model*.safetensors")}


def disturbed(recipe: Path, out: Path, *, number: int, rank: int, lines: int, restarts: int, limit: float = 240.0) -> Outcome:
    """Run, and send signal `number` to `rank` once `lines` metrics lines have been logged."""
    log = out.with_suffix(".log")
    process = launch(recipe, out, restarts, log)
    end, sent, said = time.monotonic() + limit, None, None
    metrics = out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < end:
        if sent is None and metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            pids = workers(process.pid)
            if len(pids) == 2:
                os.kill(pids[rank], number)
                sent = time.monotonic()
        if sent is not None and said is None and f"rank {rank} (".encode() in log.read_bytes():
            said = time.monotonic() - sent
        time.sleep(0.01)
    if process.poll() is None:  # a trial that hangs fails
        for pid in [*workers(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
    return Outcome(process.wait(), log.read_text(errors="replace"), said)


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank-timeout", type=float, default=6.0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("BARDLING_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("".join(f"The {chance.choice(WORDS)} met {i % 7} times.\n" for i in range(3000)))
        recipe = folder / "recipe.toml"
        recipe.write_text(
            RECIPE.format(text=folder / "text.txt", steps=STEPS, timeout=options.rank_timeout, layout=options.layout)
        )
        if launch(recipe, folder / "calm", 0, folder / "calm.log").wait():
            raise SystemExit(f"the undisturbed run failed:\n{(folder / 'calm.log').read_text()}")
        if len(weights(folder / "calm")) != {"ddp": 1, "fsdp": 2}[options.layout]:
            raise SystemExit("the undisturbed run has another layout")
        good = 0
        for trial in range(options.trials):
            out = folder / f"trial{trial}"
            number = (signal.SIGKILL, signal.SIGSTOP)[trial % 2]
            rank, lines = chance.randrange(2), chance.randrange(6, LATEST)
            begin = time.monotonic()
            outcome = disturbed(recipe, out, number=number, rank=rank, lines=lines, restarts=3)
            named = re.findall(rf"^bardling: rank {rank} \(.*last in: .*$", outcome.output, re.MULTILINE)
            faults = []
            if outcome.status:
                faults.append(f"status {outcome.status}")
            else:
                if losses(out) != losses(folder / "calm"):
                    faults.append("other losses")
                if weights(out) != weights(folder / "calm"):
                    faults.append("other weights")
            if len(named) != 1:
                faults.append(f"{len(named)} messages")
            good += not faults
            message = "never" if outcome.seconds is None else f"after {outcome.seconds:.1f} s"
            what = f"{number.name} to rank {rank} at line {lines}: named {message}, whole run {time.monotonic() - begin:.0f} s"
            print(f"{trial + 1:3}  {what}: {', '.join(faults) or 'the same losses and weights'}", flush=True)
            if faults:
                print(outcome.output[-3000:])
            shutil.rmtree(out, ignore_errors=True)
        print(f"{good} of {options.trials}")
        raise SystemExit(good != options.trials)


WORDS = ("king", "queen", "rose", "thorn", "night", "day", "love", "war", "sea", "storm")

if __name__ == "__main__":
    main()
