"""Generation: tokens per second against `transformers.generate` and nanoGPT's loop without a cache, measured side by side.

    python benchmarks/generation.py                                  # GPT-2 124M with random weights; 1, 8 and 16 prompts
    python benchmarks/generation.py --sides float32 transformers --prompts 8
    python benchmarks/generation.py --tiny                           # seconds: to try the script

Method. Each side runs in a process of its own, with the same weights and prompts, and generates greedily. In each round every
side generates the same number of tokens once, in rotating order, so that all see the same machine; prompts are computed within
that time. A ratio compares two sides of one round, and the table shows the median of the ratios with minimum and maximum.

`float32`, `int8` and `bfloat16` are `bardling sample` with these `--weights`, in huge pages as there. `transformers` is
GPT2LMHeadModel in float32 with the defaults of `generate`. `nanogpt` computes the whole context for each token, as nanoGPT's
generate does, on our model; it is slow and therefore runs in the first round only.

GB/s: bytes of the weights that a decoded token reads, times tokens of a row per second; caches and activations are left out.
Above the table is the speed at which plain PyTorch reads as many bytes.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from bardling.cli.parse import parse
from bardling.config import ModelConfig
from bardling.distributed.device import keep_freed_memory
from bardling.distributed.huge_pages import VARIABLE
from bardling.distributed.threads import limit_threads
from bardling.errors import UserError
from bardling.files.cpu_quota import cpu_quota
from bardling.generation.generate import generate
from bardling.generation.weights import convert_weights
from bardling.model.gpt import GPT
from tables import Table, publish, rounded, say, script, spread

OURS = {"float32": 4, "int8": 1, "bfloat16": 2}
"""Bytes per weight."""
SIDES = (*OURS, "transformers", "nanogpt")
SIZES = {
    "gpt2-124m": ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
    "small": ModelConfig(n_layer=4, n_head=4, n_embd=256, block_size=512, vocab_size=2048),
    "tiny": ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=65),
}
PROMPT = 16  # tokens


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    size: str = "gpt2-124m"
    """gpt2-124m or small (3.7 M parameters)."""
    sides: tuple[str, ...] = SIDES
    """Of float32, int8, bfloat16, transformers, nanogpt."""
    prompts: tuple[int, ...] = (1, 8, 16)
    """Numbers of prompts in a batch."""
    new_tokens: int = 128
    """Tokens to generate per prompt."""
    rounds: int = 5
    """Rounds."""
    clock: Literal["wall", "cpu"] = "wall"
    """What to time; cpu, the CPU time of the process, is for a busy machine, with OMP_NUM_THREADS=1."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Measure a tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure all sides for each number of prompts and write one table."""
    options = parse(Options, argv, prog="generation.py", description="Tokens per second of generation.")
    for side in options.sides:
        if side not in SIDES:
            raise UserError(f"--sides {side}: choose from {', '.join(SIDES)}")
    if options.size not in SIZES:
        raise UserError(f"--size {options.size}: choose from {', '.join(SIZES)}")
    if min(options.rounds, options.new_tokens, *options.prompts) < 1:
        raise UserError("--rounds, --new_tokens and --prompts: must be at least 1")
    config = SIZES["tiny" if options.tiny else options.size]
    new_tokens = min(options.new_tokens, config.block_size - PROMPT)
    rows: list[tuple[str, ...]] = []
    notes = [f"plain PyTorch reads {_read_speed(config):.1f} GB/s", f"times are {options.clock} time"]
    with ExitStack() as stack:
        sides = {side: stack.enter_context(Side(side, config, options.clock)) for side in options.sides}
        for count in options.prompts:
            more, remarks = measure(sides, count, new_tokens, 1 if options.tiny else options.rounds, config)
            rows += more
            notes += remarks
    notes.append("ratio: tokens per second relative to transformers, median (minimum-maximum) over the rounds")
    columns = ("prompts", "side", "tokens/s", "GB/s", "ratio")
    title = f"{'tiny' if options.tiny else options.size}, {PROMPT}-token prompts, {new_tokens} new tokens each"
    publish(
        "generation", [Table(title, columns, rows, notes)], device=torch.device("cpu"), command=argv, folder=options.results
    )


def measure(
    sides: dict[str, "Side"], count: int, new_tokens: int, rounds: int, config: ModelConfig
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and notes for one number of prompts."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    texts: dict[str, list[list[int]]] = {}
    order = list(sides)
    for turn in range(rounds):
        for side in order:
            if side == "nanogpt" and turn > 0:
                continue
            if turn == 0 and side != "nanogpt":
                sides[side].generate(count, 4)  # kernels are chosen and memory is allocated
            elapsed, texts[side] = sides[side].generate(count, new_tokens)
            seconds[side].append(elapsed)
        times = ", ".join(f"{side} {seconds[side][-1]:.2f}" for side in sides)
        say(f"{count} prompts: round {turn + 1} of {rounds}: seconds: {times}")
        order = [*order[1:], order[0]]
    rows = []
    for side, times in seconds.items():
        speed = count * new_tokens / statistics.median(times)
        base = seconds.get("transformers", [])
        ratios = [theirs / own for theirs, own in zip(base, times, strict=False)]
        read = _bytes_read(config, OURS.get(side, 4)) * speed / count / 1e9
        rows.append((str(count), side, rounded(speed), f"{read:.1f}", spread(ratios) if ratios else "n/a"))
    reference = "transformers" if "transformers" in texts else next(iter(texts))
    notes = []
    for side, text in texts.items():
        if side != reference:
            equal = sum(
                a == b for row, other in zip(text, texts[reference], strict=True) for a, b in zip(row, other, strict=True)
            )
            notes.append(f"{count} prompts: {side}: {equal} of {count * new_tokens} greedy tokens equal those of {reference}")
    return rows, notes


class Side:
    """A process that generates on request."""

    def __init__(self, name: str, config: ModelConfig, clock: str) -> None:
        say(f"{name}: set-up")
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, config, clock, other), daemon=True)
        if name in OURS:
            os.environ[VARIABLE] = "1"  # as the `bardling` command does; the process inherits it
        self._process.start()
        os.environ.pop(VARIABLE, None)
        other.close()
        self._answer()

    def generate(self, prompts: int, new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each prompt."""
        self._pipe.send((prompts, new_tokens))
        answer: tuple[float, list[list[int]]] = self._answer()
        return answer

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise UserError(f"{self.name}: its process exited; see its last line of output above") from None
        if isinstance(answer, UserError):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(30)


def _serve(name: str, config: ModelConfig, clock: str, pipe: Connection) -> None:
    """A side's process: builds the model, then generates until the parent closes the pipe."""
    try:
        now = time.perf_counter if clock == "wall" else time.process_time
        run = _transformers(config) if name == "transformers" else _ours(name, config)
        pipe.send("ready")
        while True:
            count, new_tokens = pipe.recv()
            prompts = _prompts(config, count)
            begun = now()
            tokens = run(prompts, new_tokens)
            pipe.send((now() - begun, tokens))
    except UserError as error:
        pipe.send(error)
    except EOFError:
        pass


Run = Callable[[Tensor, int], list[list[int]]]


def _ours(name: str, config: ModelConfig) -> Run:
    limit_threads(cpu_quota())  # as `bardling sample` does
    keep_freed_memory()
    model = random_model(config)
    if name == "nanogpt":
        return lambda prompts, count: _without_cache(model, prompts, count)
    converted = lru_cache(maxsize=1)(lambda rows: convert_weights(model, name, rows))  # type: ignore[arg-type]

    def run(prompts: Tensor, count: int) -> list[list[int]]:
        steps = list(generate(converted(len(prompts)), prompts, max_new_tokens=count, temperature=0))
        return [[int(step[row] or 0) for step in steps] for row in range(len(prompts))]

    return run


@torch.no_grad()
def _without_cache(model: GPT, prompts: Tensor, count: int) -> list[list[int]]:
    """nanoGPT's generate: a forward pass over the whole context for each token."""
    tokens = prompts
    for _ in range(count):
        hidden = model(tokens[:, -model.config.block_size :], output="hidden")
        newest = model.head(hidden[:, -1]).argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, newest], dim=1)
    texts: list[list[int]] = tokens[:, prompts.size(1) :].tolist()
    return texts


def _transformers(config: ModelConfig) -> Run:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: pip install 'bardling[hf]'") from None
    shape = {"n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, bos_token_id=None, eos_token_id=None, **shape)).eval()
    state = random_model(config).state_dict()
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # which it stores as [in, out]
    state = {key: value.t().contiguous() if key.endswith(matrices) else value for key, value in state.items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: config.vocab_size]
    model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})

    def run(prompts: Tensor, count: int) -> list[list[int]]:
        settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        texts: list[list[int]] = made[:, prompts.size(1) :].tolist()
        return texts

    return run


def random_model(config: ModelConfig) -> GPT:
    """Random weights; larger ones in the blocks than at the start of training, so that texts depend on their context."""
    model = GPT(config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            if parameter.dim() > 1:
                parameter *= 5
    return model


def _prompts(config: ModelConfig, count: int) -> Tensor:
    return torch.randint(config.vocab_size, (count, PROMPT), generator=torch.Generator().manual_seed(count))


def _bytes_read(config: ModelConfig, per_weight: int) -> int:
    """Of the weights, per decoded token: all matrices of blocks, and the head."""
    width = config.n_embd
    return (12 * config.n_layer * width * width + config.vocab_size * width) * per_weight


def _read_speed(config: ModelConfig) -> float:
    """Speed at which PyTorch sums a tensor as large as the float32 weights (GB/s): the fastest of five times."""
    values = torch.ones(_bytes_read(config, 4) // 4)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - begun)
    return values.nbytes / min(times) / 1e9


if __name__ == "__main__":
    script(main)
