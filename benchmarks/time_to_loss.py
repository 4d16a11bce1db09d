"""Time to a loss: wall-clock time of the whole process to reach a validation loss on character-level tiny Shakespeare.

    python benchmarks/time_to_loss.py --recipe RECIPE --nanogpt ~/nanoGPT
    python benchmarks/time_to_loss.py --recipe RECIPE --text input.txt --steps 300 --repeat 3 --warm
    python benchmarks/time_to_loss.py --setting baby --nanogpt ~/nanoGPT --device cuda
    python benchmarks/time_to_loss.py --recipe RECIPE --text input.txt -- --train.steps 400 --optim.muon_lr 0.03

The time of a command is measured from start to exit, including interpreter, imports, compilation and saving. Validation does
not count, and nothing has to be subtracted: the timed commands do not validate.

1. Preparation, not timed: the text is tokenized once, for both trainers; the last tenth is the validation split.
2. Search, not timed: `bardling train RECIPE` validates every --every steps on the whole validation split. The first step at
   or below the target is the step S to reach. --steps sets S instead.
3. Timed: the same command without validation, stopped after step S. Seed, decay length and all other settings are those of
   the search, so that training is identical; the compile cache is a new empty folder, unless --warm is given. Afterwards the
   saved model is evaluated on the whole validation split, to check that it reached the target. (With an EMA of the weights,
   `optim.ema_decay`, the search's loss at step S counts instead, since the raw weights are saved.)
4. nanoGPT, timed alternately with step 3: the command in its README, in a copy of the checkout, on the same tokens. Its
   evaluation is reduced to one batch of each split before the first and after the last step, at which it saves; the saved
   model is evaluated by the same code on the whole validation split. In the setting `baby` its best loss comes before its
   last step, so an untimed run with its own evaluation finds that step first.

Losses are means over all validation tokens but the first, in sequences as long as the model's context, computed in float32.
Timed runs alternate; with --repeat the table shows medians.
"""

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bardling.checkpoint.load import load
from bardling.checkpoint.run_folder import open_run
from bardling.cli.parse import parse
from bardling.cli.recipe import parse_recipe_command
from bardling.cli.train import TrainOptions
from bardling.config import RunConfig
from bardling.config.recipes import load_recipe
from bardling.data.batches.loader import EvalSequences
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import Precision, choose_device
from bardling.errors import UserError
from bardling.evaluate.loss import evaluate_loss
from bardling.monitor.jsonl import read_jsonl
from tables import Table, publish, say, script, spread

ALL = 10**9  # sequences: more than there are


@dataclass(frozen=True)
class Setting:
    """The loss to reach, and nanoGPT's command for it."""

    target: float
    recipe: str
    flags: tuple[str, ...]  # for nanoGPT's train.py, after its configuration file
    steps: int  # nanoGPT's
    passes_best: bool  # nanoGPT overfits before the end of its training


SETTINGS = {
    # The CPU example in nanoGPT's README.
    "small": Setting(
        target=1.8857,
        recipe="shakespeare-cpu",
        flags=(
            *("--compile=False", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"),
            *("--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
        ),
        steps=2000,
        passes_best=False,
    ),
    # The GPU example in its README.
    "baby": Setting(target=1.4697, recipe="shakespeare-char", flags=(), steps=5000, passes_best=True),
}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    setting: Literal["small", "baby"] = "small"
    """small: to 1.8857, against 4 layers of width 128; baby: to 1.4697, against 6 layers of width 384 (GPU, or hours)."""
    recipe: str | None = None
    """Bardling recipe: a shipped name or a TOML file; default: shakespeare-cpu, or shakespeare-char for baby."""
    text: str = "shakespeare-char"
    """The text: a file, or the name of the dataset, which is downloaded."""
    nanogpt: Path | None = None
    """A nanoGPT checkout to time too. Its code is executed."""
    target: float | None = None
    """Validation loss to reach; default: depends on the setting."""
    steps: int | None = None
    """Step at which Bardling reaches it; default: found by the search."""
    every: int = 10
    """Steps between validations in the search."""
    repeat: int = 1
    """Timed runs per trainer."""
    warm: bool = False
    """Reuse the search's compile cache in the timed runs, as in a second run."""
    nanogpt_flags: str = ""
    """Flags of nanoGPT's train.py that override the setting's, without dashes: 'max_iters=20 lr_decay_iters=20'."""
    device: str = "cpu"
    """Device for both trainers."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""


@dataclass(frozen=True)
class Timed:
    """One timed run."""

    seconds: float  # whole process
    before_first: float | None  # until the first step was logged
    steps: int
    loss: float  # on the whole validation split


def main(argv: Sequence[str]) -> None:
    """Prepare, search, time and write the table."""
    own, more = (argv[: list(argv).index("--")], argv[list(argv).index("--") + 1 :]) if "--" in argv else (argv, ())
    options = parse(Options, own, prog="time_to_loss.py", description="Wall-clock until a validation loss.")
    for name in ("every", "repeat", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    setting = SETTINGS[options.setting]
    device = choose_device(options.device)
    if options.nanogpt is not None and not (options.nanogpt / "config" / "train_shakespeare_char.py").is_file():
        raise UserError(f"--nanogpt {options.nanogpt}: has no config/train_shakespeare_char.py; give a nanoGPT checkout")
    target = setting.target if options.target is None else options.target
    load_recipe(options.recipe or setting.recipe)  # report a wrong name before any work
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as folder:
        work = Path(folder)
        data = _prepare(options.text, work / "data")
        ours = Ours(options, setting, more, data, work)
        step, found = ours.search(target)
        theirs = None if options.nanogpt is None else NanoGPT(options, setting, data, work)
        sides: dict[str, list[Timed]] = {"bardling": []} | ({} if theirs is None else {"nanoGPT": []})
        for turn in range(options.repeat):
            sides["bardling"].append(ours.timed(step, turn))
            _tell("bardling", sides["bardling"][-1])
            if theirs is not None:
                sides["nanoGPT"].append(theirs.timed(turn))
                _tell("nanoGPT", sides["nanoGPT"][-1])
    table = _table(options, target, found, sides, ours.describe(), None if theirs is None else theirs.describe())
    publish("time_to_loss", [table], device=device, command=argv, folder=options.results)


def _tell(side: str, timed: Timed) -> None:
    say(f"{side}: {timed.seconds:.1f} s for {timed.steps} steps, validation loss {timed.loss:.4f}")


def _prepare(text: str, out: Path) -> TokenDataset:
    """The tokenized text, with the last tenth as validation split."""
    say(f"preparing {text}")
    try:
        dataset = prepare(text, out, "char", val_fraction=0.1)
    except UserError as error:
        raise UserError(str(error).replace("--data.source", "--text")) from None
    if dataset.tokenizer is None:
        raise UserError(f"{text}: is not a text file")
    return dataset


def full_loss(model: Path, data: TokenDataset, device: torch.device) -> float:
    """Loss (nats) of a saved model on the whole validation split, in float32."""
    built = load(model).build().to(device)
    windows = EvalSequences(data.split("val"), built.config.block_size, None)
    precision = Precision("float32", "fixed", device.type)
    context = Context(rank=0, world_size=1, device=device)
    return evaluate_loss(built, windows, batch_size=64, precision=precision, context=context).loss


def _table(options: Options, target: float, found: str, sides: dict[str, list[Timed]], ours: str, theirs: str | None) -> Table:
    rows = []
    for side, runs in sides.items():
        middle = statistics.median(run.seconds for run in runs)
        factor = middle / statistics.median(run.seconds for run in sides["bardling"])
        starts = [run.before_first for run in runs if run.before_first is not None]
        rows.append(
            (
                side,
                str(runs[-1].steps),
                spread([run.seconds for run in runs], "{:.1f}") if len(runs) > 1 else f"{middle:.1f}",
                f"{statistics.median(starts):.1f}" if starts else "n/a",
                f"{runs[-1].loss:.4f}",
                "yes" if max(run.loss for run in runs) <= target else "NO",
                f"{factor:.2f}",
            )
        )
    notes = [
        f"target: validation loss {target:g} on the whole validation split; {found}",
        f"bardling: {ours}; compile cache {'warm' if options.warm else 'cold'}",
        "whole process: from the start of the command to its exit, nothing subtracted; x: relative to bardling",
    ]
    if theirs is not None:
        notes.append(f"nanoGPT: {theirs}")
    columns = ("trainer", "steps", "whole process, s", "until first step, s", "validation loss", "reached", "x")
    return Table(f"Time to {target:g} ({options.setting})", columns, rows, notes)


class Ours:
    """`bardling train`, run as a command."""

    def __init__(self, options: Options, setting: Setting, more: Sequence[str], data: TokenDataset, work: Path) -> None:
        self._options, self._data, self._work = options, data, work
        recipe = options.recipe or setting.recipe
        fixed = ["--device", options.device, "--data.source", str(data.path), "--checkpoint.every", "0"]
        fixed += ["--checkpoint.save_best", "False", "--sample.every", "0"]
        # Checks the options now rather than after the search.
        _, _, train_options = parse_recipe_command("train", TrainOptions, [recipe, *more, *fixed], "")
        self.config: RunConfig = train_options.config
        self._command = [sys.executable, "-m", "bardling", "train", recipe, *more, *fixed]
        # A timed run is shorter, but its decay must not be.
        self._same = ["--optim.decay_steps", str(self.config.optim.decay_steps or self.config.train.steps)]
        self._searched: dict[int, float] = {}

    def search(self, target: float) -> tuple[int, str]:
        """The step to reach, and how it was determined.

        Raises:
            UserError: the recipe does not reach the target.
        """
        if self._options.steps is not None:
            return self._options.steps, f"after step {self._options.steps}, as given"
        every = self._options.every
        say(f"searching: {self.config.train.steps} steps with a validation every {every}")
        out, _, _ = self._run("search", "caches", ["--eval.every", str(every), "--eval.windows", str(ALL)])
        records = [record for record in read_jsonl(out / "metrics.jsonl") if record["kind"] == "val"]
        self._searched = {record["step"]: float(record["loss"]) for record in records}
        reached = [step for step, loss in self._searched.items() if loss <= target]
        if not reached:
            step = min(self._searched, key=self._searched.__getitem__)
            raise UserError(
                f"the recipe does not reach {target:g} in its {self.config.train.steps} steps: its lowest validation loss is "
                f"{self._searched[step]:.4f}, after step {step}; try more steps (-- --train.steps N) or another --target"
            )
        # Keep what `auto` decided for the whole run.
        self._same += ["--compile", open_run(out).config().compile]
        loss = self._searched[reached[0]]
        return reached[0], f"a search with a validation every {every} steps found {loss:.4f} after step {reached[0]}"

    def timed(self, step: int, turn: int) -> Timed:
        """Train to that step and measure the time."""
        more = ["--train.steps", str(step), "--eval.every", "0", "--eval.windows", "1", *self._same]
        out, started, seconds = self._run(f"timed-{turn}", "caches" if self._options.warm else f"caches-{turn}", more)
        self.config = open_run(out).config()
        first = next(record["time"] for record in read_jsonl(out / "metrics.jsonl") if record["kind"] == "train")
        loss = full_loss(out, self._data, choose_device(self._options.device))
        if self.config.optim.ema_decay and step in self._searched:
            loss = self._searched[step]
        return Timed(seconds, first - started, step, loss)

    def describe(self) -> str:
        """The model and its settings."""
        model, chosen = self.config.model, f"{self.config.precision}, compile {self.config.compile}"
        shape = f"{model.n_layer} layers of width {model.n_embd}, context {model.block_size}"
        return f"{shape}, batch {self.config.train.batch_size}, {chosen}; {self.config.optim.name}, seed {self.config.seed}"

    def _run(self, name: str, caches: str, more: Sequence[str]) -> tuple[Path, float, float]:
        """Run the command; returns the run folder, the start time (Unix time) and the duration (seconds)."""
        out, words, folder = self._work / name, self._work / f"{name}.txt", self._work / caches
        places = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "BARDLING_CACHE": "bardling"}
        environment = {**os.environ, **{key: str(folder / place) for key, place in places.items()}}
        command = [*self._command, *more, "--out", str(out)]
        with words.open("w", encoding="utf-8") as file:
            started, clock = time.time(), time.perf_counter()
            status = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
            seconds = time.perf_counter() - clock
        if status:
            raise UserError(f"bardling train ended with status {status}: {_last_line(words)}")
        return out, started, seconds


class NanoGPT:
    """nanoGPT's train.py, run as a command in a copy of the checkout with the same tokens."""

    def __init__(self, options: Options, setting: Setting, data: TokenDataset, work: Path) -> None:
        assert options.nanogpt is not None
        self._options, self._setting, self._data, self._folder = options, setting, data, work / "nanogpt"
        ignored = shutil.ignore_patterns(".git", "data", "assets", "out*", "*.ipynb", "__pycache__")
        shutil.copytree(options.nanogpt, self._folder, ignore=ignored)
        place = self._folder / "data" / "shakespeare_char"
        place.mkdir(parents=True)
        for name in ("train", "val"):
            split = data.split(name)
            split.read(0, len(split)).astype("<u2").tofile(place / f"{name}.bin")
        assert data.tokenizer is not None
        characters = {number: data.tokenizer.decode([number]) for number in range(data.vocab_size)}
        meta = {"vocab_size": data.vocab_size, "itos": characters, "stoi": {text: i for i, text in characters.items()}}
        (place / "meta.pkl").write_bytes(pickle.dumps(meta))
        self._flags = [*setting.flags, *(f"--{flag.lstrip('-')}" for flag in options.nanogpt_flags.split())]
        limits = [flag.partition("=")[2] for flag in self._flags if flag.startswith("--max_iters=")]
        self._steps = int(limits[-1]) if limits else setting.steps
        if setting.passes_best:
            self._steps = self._best_step()

    def timed(self, turn: int) -> Timed:
        """Train and measure the time."""
        out = f"out-{turn}"
        quiet = ["--eval_iters=1", f"--eval_interval={self._steps}", f"--max_iters={self._steps}"]
        quiet += ["--always_save_checkpoint=True", f"--out_dir={out}"]
        lines, seconds = self._run([*self._flags, *quiet])
        first = next((moment for moment, line in lines if line.startswith("iter ")), None)
        saved = self._folder / out / "ckpt.pt"
        if not saved.is_file():
            raise UserError(
                f"nanoGPT's train.py did not save {out}/ckpt.pt; its last line: {lines[-1][1] if lines else 'none'}"
            )
        return Timed(seconds, first, self._steps, full_loss(saved, self._data, choose_device(self._options.device)))

    def describe(self) -> str:
        """The timed command."""
        words = ["python train.py config/train_shakespeare_char.py", f"--device={self._options.device}", *self._flags]
        return f"`{' '.join(words)}`, saved and stopped after step {self._steps}"

    def _best_step(self) -> int:
        """The step with the lowest validation loss in nanoGPT's own evaluation."""
        say("nanoGPT: an untimed run with its own evaluation, to find its best step")
        lines, _ = self._run([*self._flags, "--out_dir=out-search"])
        found = [re.match(r"step (\d+): .*val loss ([\d.]+)", line) for _, line in lines]
        losses = {int(match[1]): float(match[2]) for match in found if match and int(match[1])}
        if not losses:
            raise UserError("nanoGPT's train.py printed no validation loss after its first step")
        return min(losses, key=losses.__getitem__)

    def _run(self, flags: Sequence[str]) -> tuple[list[tuple[float, str]], float]:
        """Run train.py; returns its output lines with their times since the start, and the total time (seconds)."""
        command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", f"--device={self._options.device}"]
        lines: list[tuple[float, str]] = []
        clock = time.perf_counter()
        with subprocess.Popen(
            [*command, *flags], cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append((time.perf_counter() - clock, line.rstrip()))
        seconds = time.perf_counter() - clock
        if process.returncode:
            raise UserError(f"nanoGPT's train.py ended with status {process.returncode}: {lines[-1][1] if lines else ''}")
        return lines, seconds


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    script(main)
