"""Finetuning on conversations: tokens per second against TRL's SFTTrainer, measured side by side.

    pip install trl
    python benchmarks/sft.py                   # a Llama of 4 layers, and conversations about Python's standard library
    python benchmarks/sft.py --model FOLDER    # another exported chat model
    python benchmarks/sft.py --tiny            # seconds: to try the script

Method. Each side runs in a process of its own (`workers.py`, `sft_sides.py`), from the same exported model. `bardling` is a run
of the recipe `chat`: conversations are packed into sequences of the context, as many to a step as fit. The other sides are
TRL's SFTTrainer, with the conversations of the same steps in the same order. First, each side takes 20 steps, whose losses, the
mean over the answers' tokens of the step, are compared. Then come rounds in which every side runs a block of steps, in rotating
order; a ratio compares two blocks of one round, and the table shows the median of the ratios with minimum and maximum.

`trl` pads the conversations of a step to the longest, in one forward pass. `trl-by-8` takes about 8 conversations per forward
pass, TRL's default, and accumulates gradients. `trl-packed` computes what TRL's packing does on the same sequences as ours:
each forward pass is one sequence of conversations without padding (`padding_free`).

Both sides: all weights, AdamW with betas 0.9 and 0.95 and weight decay 0.1 for matrices only, a learning rate that falls
linearly, gradient clipping at 1, eager code, float32 unless --precision says otherwise. TRL's gradient checkpointing, by
default on, is off. Tokens are those of conversations, without padding.
"""

import ast
import inspect
import json
import random
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.load import load
from bardling.cli.parse import parse
from bardling.config import ModelConfig
from bardling.data.tokens.chatml import with_chatml
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT
from sft_sides import Messages, SideSpec, Steps
from tables import Table, publish, rounded, say, script, spread
from workers import Worker, closest_curves

PROGRAM = Path(__file__).resolve().with_name("sft_sides.py")
CURVE_STEPS = 20
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a loss from TRL's (nats)."""
SIDES = ("trl", "trl-by-8", "trl-packed")
SIZES = {
    "small": (ModelConfig(n_layer=4, n_head=4, n_embd=256, block_size=512, family="llama"), "bpe:8192"),
    "tiny": (ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=128, family="llama"), "bpe:400"),
}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    model: Path | None = None
    """An exported chat model to start from; default: a Llama of 4 layers and width 256 with random weights."""
    sides: tuple[str, ...] = SIDES
    """Of trl, trl-by-8, trl-packed."""
    rows: int = 4
    """Packed sequences of a step."""
    context: int = 512
    """Tokens of a sequence."""
    lr: float = 3e-4
    """Learning rate of the first step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products, on both sides."""
    rounds: int = 6
    """Rounds."""
    block: int = 3
    """Steps per side and round."""
    clock: Literal["wall", "cpu"] = "wall"
    """What to time; cpu, the CPU time of the process, is for a busy machine, with OMP_NUM_THREADS=1."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Measure a tiny model instead, to try the script."""


@dataclass
class _Measured:
    worker: Worker
    curve: tuple[float, ...]
    blocks: list[float] = field(default_factory=list)  # seconds per step, for each round


def main(argv: Sequence[str]) -> None:
    """Measure all sides and write one table."""
    options = parse(Options, argv, prog="sft.py", description="Tokens per second of finetuning against TRL.")
    for side in options.sides:
        if side not in SIDES:
            raise UserError(f"--sides {side}: choose from {', '.join(SIDES)}")
    for name in ("rows", "context", "rounds", "block"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.tiny:
        options = replace(options, rows=2, context=128, rounds=1, block=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "conversations.jsonl"
        conversations = list(docstring_conversations())
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
        model = options.model or make_model(folder / "model", conversations, "tiny" if options.tiny else "small")
        rows, notes = measure(options, model, data, folder)
    columns = ("side", "passes", "padding", "ms/step", "tokens/s", "answer tokens/s", "ratio")
    title = f"Finetuning in {options.precision}: {options.rows} sequences of {options.context} tokens per step"
    publish("sft", [Table(title, columns, rows, notes)], device=torch.device("cpu"), command=argv, folder=options.results)


def docstring_conversations() -> Iterator[list[dict[str, str]]]:
    """Questions about functions of Python's standard library, answered by their docstrings; one to three to a conversation."""
    rng = random.Random(0)
    turns: list[dict[str, str]] = []
    wanted = 1
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef) or len(text := ast.get_docstring(node) or "") < 20:
                continue
            question = f"What does {node.name}({ast.unparse(node.args)}) in the module {path.stem} do?"
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": inspect.cleandoc(text)}]
            if len(turns) >= 2 * wanted:
                yield turns
                turns, wanted = [], rng.choice((1, 1, 2, 3))


def make_model(folder: Path, conversations: Sequence[Messages], size: str) -> Path:
    """A chat model with random weights, as `bardling export` writes it."""
    config, spec = SIZES[size]
    texts = (message["content"] for messages in conversations for message in messages)
    tokenizer = with_chatml(build_tokenizer(spec, texts))
    config = replace(config, vocab_size=tokenizer.vocab_size)
    folder.mkdir()
    write_model(folder, config, GPT(config, seed=0).state_dict(), tokenizer)
    return folder


def measure(options: Options, model: Path, data: Path, folder: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and notes of the table."""
    ours = SideSpec(
        kind="bardling",
        model=str(model),
        steps=CURVE_STEPS + options.rounds * options.block + 1,  # the last one is not run: the sides wait before it
        rows=options.rows,
        context=options.context,
        lr=options.lr,
        precision=options.precision,
        clock=options.clock,
        data=str(data),
        out=str(folder / "run"),
    )
    environment = {"BARDLING_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        sides: dict[str, _Measured] = {}
        for side in ("bardling", *options.sides):
            say(f"{side}: set-up and the first {CURVE_STEPS} steps")
            names = sides["bardling"].worker.facts["names"] if sides else []
            spec = trl_spec(side, ours, names, folder) if sides else ours
            worker = stack.enter_context(Worker(spec, side, environment, program=PROGRAM))
            sides[side] = _Measured(worker, worker.steps(CURVE_STEPS).losses)
        order = list(sides)
        for turn in range(options.rounds):
            for side in order:
                sides[side].blocks.append(sides[side].worker.steps(options.block).seconds)
            times = ", ".join(f"{side} {sides[side].blocks[-1] * 1e3:.0f}" for side in sides)
            say(f"round {turn + 1} of {options.rounds}: ms per step: {times}")
            order = [*order[1:], order[0]]
    return _rows(sides, options), _notes(sides, options, model)


def trl_spec(side: str, ours: SideSpec, names: list[list[list[str]]], folder: Path) -> SideSpec:
    """A side of TRL on the conversations of our steps, divided into forward passes. `names`: FILE:LINE, of each sequence."""
    rows = [json.loads(line)["messages"] for line in Path(ours.data).read_text(encoding="utf-8").splitlines()]
    steps: Steps = [[[rows[int(name.rpartition(":")[2]) - 1] for name in row] for row in step] for step in names]
    if side != "trl-packed":
        steps = [[[messages for row in step for messages in row]] for step in steps]
    if side == "trl-by-8":
        passes = round(statistics.mean(len(step[0]) for step in steps) / 8) or 1
        steps = [[step[0][number::passes] for number in range(passes)] for step in steps]
    path = folder / f"{side}.json"
    path.write_text(json.dumps(steps), encoding="utf-8")
    return replace(ours, kind="trl", data=str(path), out="", padding_free=side == "trl-packed")


def _rows(sides: dict[str, _Measured], options: Options) -> list[tuple[str, ...]]:
    rows = []
    for side, measured in sides.items():
        sizes = _sizes_of(sides, side)
        speeds = {}
        for place, name in ((1, "tokens"), (2, "answers")):
            totals = [sum(size[place] for size in block) / options.block for block in _blocks(sizes, options)]
            speeds[name] = statistics.median(total / time for total, time in zip(totals, measured.blocks, strict=True))
        padded = options.rows * options.context * len(sizes) if side == "bardling" else sum(size[3] for size in sizes)
        padding = 0.0 if measured.worker.spec.padding_free else 1 - sum(size[1] for size in sizes) / padded
        ratios = [theirs / ours for theirs, ours in zip(measured.blocks, sides["bardling"].blocks, strict=True)]
        passes = 1 if side == "bardling" else measured.worker.facts["passes"]
        rows.append(
            (
                side,
                str(passes),
                f"{padding:.0%}",
                rounded(statistics.median(measured.blocks) * 1e3),
                f"{speeds['tokens']:,.0f}",
                f"{speeds['answers']:,.0f}",
                "1" if side == "bardling" else spread(ratios),
            )
        )
    return rows


def _sizes_of(sides: dict[str, _Measured], side: str) -> list[list[int]]:
    """Conversations, tokens, answers and padded tokens of each step; ours are those of the same steps in TRL."""
    chosen = side if side != "bardling" else next(name for name in sides if name != "bardling")
    sizes: list[list[int]] = sides[chosen].worker.facts["sizes"]
    return sizes


def _blocks(sizes: list[list[int]], options: Options) -> list[list[list[int]]]:
    """The steps of each round."""
    starts = range(CURVE_STEPS, CURVE_STEPS + options.rounds * options.block, options.block)
    return [sizes[start : start + options.block] for start in starts]


def _notes(sides: dict[str, _Measured], options: Options, model: Path) -> list[str]:
    sizes, config = _sizes_of(sides, "bardling"), load(model).config
    count, tokens, answers = (statistics.mean(size[place] for size in sizes) for place in range(3))
    facts: dict[str, Any] = sides["bardling"].worker.facts
    notes = [
        f"{config.family}, {config.n_layer} layers, width {config.n_embd}, vocabulary {config.vocab_size:,}, "
        f"{facts['parameters'] / 1e6:.1f} M parameters, context {config.block_size}",
        f"a step has {count:.1f} conversations on average, {tokens / count:.0f} tokens each, of which {answers / tokens:.0%} "
        "are answers",
    ]
    ours, bound = sides["bardling"].curve, TOLERANCE[options.precision]
    for side, measured in sides.items():
        if side != "bardling":
            gap = closest_curves(ours, measured.curve)
            verdict = "within" if gap <= bound else "BEYOND"
            notes.append(
                f"{side}: losses of the first {CURVE_STEPS} steps ({ours[0]:.4f} to {ours[-1]:.4f}) differ from ours by at "
                f"most {gap:.1e} nats, {verdict} the tolerance of {bound:g}"
            )
    notes.append(f"times are {options.clock} time; ratio: step time relative to ours, median (minimum-maximum) over the rounds")
    return notes


if __name__ == "__main__":
    script(main)
