"""Reading batches of a prepared dataset: speed and memory of opening the file for each sequence and of memory maps.

    python benchmarks/reading.py            # 1 GB of tokens, written for the purpose, then 10,000 batches with each method
    python benchmarks/reading.py --tiny     # seconds: to try the script

Method. `open` is the library's reader: each sequence opens its file, reads and closes it (`data/tokens/shards.py`). `map` is
the same with a memory map of each file that stays open. Each runs in a process of its own, through the loader's code that
shuffles, cuts, checks and shifts, without a prefetching thread. The tokens are random, because reading does not depend on them.
Batches are read in ten blocks; memory is looked at after each. A ratio compares with what a GPU consumes that trains at --gpu
tokens per second.

`cold` first asks the system to drop the files from its page cache, which it may refuse; the disk then counts.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardling.cli.parse import parse
from bardling.data.batches.loader import TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.tokens.manifest import ShardFile, token_dtype
from bardling.data.tokens.shards import ShardWriter, TokenSplit
from bardling.errors import UserError
from tables import Table, publish, rounded, script

VOCAB_SIZE = 50257
METHODS = ("open", "map", "open, cold", "map, cold")


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    tokens: int = 500_000_000
    """Tokens of 2 bytes."""
    shard: int = 100_000_000
    """Tokens per file."""
    batches: int = 10_000
    """Batches per method."""
    size: int = 16
    """Sequences per batch."""
    context: int = 1024
    """Tokens per sequence."""
    gpu: int = 575_000
    """Tokens per second that a GPU trains on."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Read few small batches, to try the script."""


class MappedSplit(TokenSplit):
    """A split whose files are memory maps that stay open."""

    _maps: dict[int, Any]

    def _read_file(self, index: int, position: int, count: int) -> Any:
        if not hasattr(self, "_maps"):
            self._maps = {}
        if index not in self._maps:
            self._maps[index] = np.memmap(self._paths[index], self._dtype, "r", offset=self._offsets[index])
        ids = np.array(self._maps[index][position : position + count])
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(f"{self._paths[index]}: an id is outside the vocabulary")
        return ids


def main(argv: Sequence[str]) -> None:
    """Measure all methods and write one table."""
    options = parse(Options, argv, prog="reading.py", description="Speed and memory of reading batches.")
    if options.tiny:
        options = replace(options, tokens=200_000, shard=60_000, batches=40, size=2, context=64)
    block = max(1, options.batches // 10)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        files = write_tokens(Path(name), options)
        for method in METHODS:
            speeds, memory = run(method, Path(name), files, options, block)
            batches = statistics.median(speeds)
            tokens = batches * options.size * options.context
            change = memory[-1][0] - memory[0][0], memory[-1][1] - memory[0][1]
            cells = (f"{memory[0][0]:.0f} + {memory[0][1]:.0f}", f"{change[0]:+.1f} {change[1]:+.1f}")
            rows.append((method, f"{batches:,.0f}", rounded(tokens / 1e6), f"{tokens / options.gpu:.0f} x", *cells))
    what = f"{options.batches:,} batches of {options.size} sequences of {options.context} tokens"
    notes = [
        f"{options.tokens * 2 / 1e9:.2f} GB in files of {options.shard * 2 / 1e6:,.0f} MB; speed: median of {block:,} batches",
        f"GPU: times the {options.gpu:,} tokens per second that it consumes",
        f"memory: the process's own and pages of files, in MB, after {block:,} batches; growth: of both until the last batch",
    ]
    columns = ("method", "batches/s", "million tokens/s", "GPU", "memory", "growth")
    publish("reading", [Table(what, columns, rows, notes)], device=torch.device("cpu"), command=argv, folder=options.results)


def write_tokens(folder: Path, options: Options) -> tuple[ShardFile, ...]:
    """A split of random tokens."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "train", VOCAB_SIZE, options.shard) as writer:
        for start in range(0, options.tokens, 1 << 22):
            writer.add(rng.integers(0, VOCAB_SIZE, min(1 << 22, options.tokens - start), np.uint16))
        return writer.finish().files


def run(
    method: str, folder: Path, files: tuple[ShardFile, ...], options: Options, block: int
) -> tuple[list[float], list[tuple[float, float]]]:
    """Batches per second and (own, file) memory in MB of each block."""
    if options.tiny:
        return measure(method, folder, files, options, block)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (method, folder, files, options, block))


def measure(
    method: str, folder: Path, files: tuple[ShardFile, ...], options: Options, block: int
) -> tuple[list[float], list[tuple[float, float]]]:
    """The same, in this process."""
    torch.set_num_threads(1)
    kind = TokenSplit if method.startswith("open") else MappedSplit
    split = kind(folder, "train", files, token_dtype(VOCAB_SIZE), VOCAB_SIZE)
    for file in files:
        with (folder / file.name).open("rb") as opened:
            if method.endswith("cold"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    source = TrainSequences(split, SequenceOrder(0, len(split), options.context))
    speeds, memory = [], []
    for first in range(0, options.batches, block):
        begun = time.perf_counter()
        for number in range(first, first + block):
            source.batch(number * options.size, options.size)
        speeds.append(block / (time.perf_counter() - begun))
        memory.append(resident())
    return speeds, memory


def resident() -> tuple[float, float]:
    """MB of memory of this process: its own, and pages of files."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(values[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


if __name__ == "__main__":
    script(main)
