"""Data order: which sequence of tokens is sample number i of a run, as a pure function of (seed, i).

An epoch cuts the tokens into sequences of `block_size` on a grid and visits each once in shuffled order. Each epoch starts the
grid at another offset, so that a model does not always see the same cuts. The shuffle is a keyed permutation: a Feistel network
over the smallest domain of 2^(2h) numbers that contains all sequences, applied again to its own output until the result is in
range ("cycle walking"; J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Nothing is stored, so a
restart needs only i, and any process can compute any part of the order.

Limits: sequences come from one dataset (`mixture.py` mixes several); the permutation is for shuffling, not for secrecy. The
numbers are part of the format: changing them would change what a resumed run sees, which a test with fixed values prevents.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bardling.errors import UserError

Int64s = npt.NDArray[np.int64]
_UInt64s = npt.NDArray[np.uint64]

ROUNDS = 8  # of the Feistel network; four already shuffle well, and eight also mix domains of a few bits
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64, which spreads consecutive numbers
MASK = (1 << 64) - 1


def mix(x: _UInt64s) -> _UInt64s:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit numbers that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: _UInt64s, keys: _UInt64s, half: int) -> _UInt64s:
    """Permute numbers below 2^(2 half), each with its own key; `x` and `keys` have the same shape."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for r in range(1, ROUNDS + 1):
        round_keys = keys + np.uint64(r * GOLDEN & MASK)
        left, right = right, left ^ (mix(right ^ round_keys) & mask)
    return (left << shift) | right


def permute(x: _UInt64s, keys: _UInt64s, size: int) -> _UInt64s:
    """Permute `x`, uint64 [count], each below `size` >= 1: for any one key, a bijection of the numbers below `size`."""
    half = max(1, -(-(size - 1).bit_length() // 2))  # size <= 2^(2 half) < 4 size: fewer than four walks on average
    out = _feistel(x, keys, half)
    outside = np.flatnonzero(out >= np.uint64(size))
    while outside.size:
        out[outside] = _feistel(out[outside], keys[outside], half)
        outside = outside[out[outside] >= np.uint64(size)]
    return out


class DataOrder(Protocol):
    """Which sequence of tokens each sample is: a pure function of its number."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the split."""

    @property
    def block_size(self) -> int:
        """Tokens of context; a sequence has one more, the last target."""

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in the split."""

    def starts(self, first: int, count: int) -> Int64s:
        """Where samples `first` to `first + count - 1` begin, int64 [count]; each covers start to start + block_size."""

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been visited after `samples` samples."""


@dataclass(frozen=True)
class SequenceOrder:
    """The order in which a run sees the sequences of one split, which must have room for at least one."""

    seed: int  # of the run
    n_tokens: int  # in the split
    block_size: int  # tokens of context; a sequence has one more, the last target
    row: int = 0  # tokens of each packed row, which is a sequence of its own; 0: sequences are cut anywhere

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"model.block_size = {self.block_size}: must be at least 1")
        if self.row and self.row != self.block_size + 1:
            remedy = f"set it to {self.row - 1}, or prepare the data again for this context"
            raise UserError(f"model.block_size = {self.block_size}: the data has rows for {self.row - 1} tokens: {remedy}")
        if self.n_tokens < self.block_size + 1:
            need = f"one sequence needs model.block_size + 1 = {self.block_size + 1:,}"
            remedy = f"lower model.block_size to at most {self.n_tokens - 1}, or add text" if self.n_tokens > 1 else "add text"
            raise UserError(f"the training split has {self.n_tokens:,} tokens, but {need}: {remedy}")

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in an epoch, each visited once; the same number in every epoch."""
        return self.n_tokens // self.row if self.row else max(1, (self.n_tokens - self.block_size) // self.block_size)

    def starts(self, first: int, count: int) -> Int64s:
        """Where samples `first` to `first + count - 1` begin, int64 [count]; each covers start to start + block_size."""
        if first < 0 or count < 0:
            raise ValueError(f"samples {first} to {first + count}: must not be negative")
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def epochs(self, samples: int) -> list[float]:
        return [samples / self.sequences_per_epoch]

    def starts_of(self, numbers: Int64s) -> Int64s:
        """Where the samples of these numbers begin, in the same order."""
        per_epoch = self.sequences_per_epoch
        max_offset = self.n_tokens - 1 - per_epoch * self.block_size  # of the grid
        samples = numbers.astype(np.uint64)
        epochs, indices = samples // np.uint64(per_epoch), samples % np.uint64(per_epoch)
        seed = mix(np.full(1, self.seed & MASK, np.uint64) + np.uint64(GOLDEN))
        keys = mix(seed ^ mix(epochs + np.uint64(1)))  # [count], one key per epoch
        if self.row:
            return (permute(indices, keys, per_epoch) * np.uint64(self.row)).astype(np.int64)
        offsets = mix(~keys) % np.uint64(max_offset + 1)
        return (offsets + permute(indices, keys, per_epoch) * np.uint64(self.block_size)).astype(np.int64)
