"""Which window of tokens sample number i of a run is: a pure function of (seed, i).

An epoch cuts the tokens into windows of `block_size` on a grid, and visits each once in a shuffled order. The grid starts at
a fresh offset every epoch, so that a model does not always see the same cuts. The shuffle is a keyed permutation: a Feistel
network over the smallest domain of 2^(2h) numbers that holds all windows, walked again from its own output until it falls
inside ("cycle walking"; J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Nothing is stored,
so a restart needs only i, and any process can compute any part of the order.

Limits: windows lie within one dataset; the permutation is for shuffling, not for secrecy. The numbers are part of the format:
changing them changes what a resumed run sees, which a test with fixed values guards against.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bardling.errors import UserError

Int64s = npt.NDArray[np.int64]
_UInt64s = npt.NDArray[np.uint64]

ROUNDS = 8  # of the Feistel network; four already shuffle well, and eight keep domains of a few bits well mixed
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64, which spreads consecutive numbers
_MASK = (1 << 64) - 1


def _mix(x: _UInt64s) -> _UInt64s:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit numbers that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: _UInt64s, keys: _UInt64s, half: int) -> _UInt64s:
    """Permute numbers below 2^(2 half), each with its own key; `x` and `keys` have the same shape."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for r in range(1, ROUNDS + 1):
        round_keys = keys + np.uint64(r * _GOLDEN & _MASK)
        left, right = right, left ^ (_mix(right ^ round_keys) & mask)
    return (left << shift) | right


def permute(x: _UInt64s, keys: _UInt64s, size: int) -> _UInt64s:
    """Permute numbers below `size`, each by the permutation that its key names.

    Args:
        x: uint64 [count], each below `size`.
        keys: uint64 [count].
        size: numbers in the domain, at least 1.

    Returns:
        uint64 [count], each below `size`; a bijection of the domain for any one key.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))  # 2^(2 half) >= size, and below 4 size: under four walks on average
    out = _feistel(x, keys, half)
    outside = np.flatnonzero(out >= np.uint64(size))
    while outside.size:
        out[outside] = _feistel(out[outside], keys[outside], half)
        outside = outside[out[outside] >= np.uint64(size)]
    return out


@dataclass(frozen=True)
class WindowOrder:
    """The order in which a run sees the windows of one split.

    Raises:
        UserError: if the split has no room for one window of `block_size` tokens and the token after it.
    """

    seed: int
    """The run's seed."""
    n_tokens: int
    """Tokens in the split."""
    block_size: int
    """Tokens of context; a window spans one more, the last target."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"model.block_size = {self.block_size}: must be at least 1")
        if self.n_tokens < self.block_size + 1:
            raise UserError(
                f"the training split has {self.n_tokens:,} tokens, but one window needs model.block_size + 1 = "
                f"{self.block_size + 1:,}: lower model.block_size to at most {max(self.n_tokens - 1, 1)}, or add text"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows that an epoch visits, each once; the same number in every epoch."""
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def epoch(self, sample: int) -> float:
        """How often the data has been seen when `sample` samples have been drawn."""
        return sample / self.windows_per_epoch

    def starts(self, first: int, count: int) -> Int64s:
        """Where the windows of samples `first` to `first + count - 1` begin.

        Returns:
            int64 [count]; window i covers the tokens from start to start + block_size, the last one included.
        """
        if first < 0 or count < 0:
            raise ValueError(f"samples {first} to {first + count}: must not be negative")
        windows = self.windows_per_epoch
        slack = self.n_tokens - 1 - windows * self.block_size  # places that the grid may begin at, less one
        samples = np.arange(first, first + count, dtype=np.uint64)
        epochs, places = samples // np.uint64(windows), samples % np.uint64(windows)
        seed = _mix(np.full(1, self.seed & _MASK, np.uint64) + np.uint64(_GOLDEN))
        keys = _mix(seed ^ _mix(epochs + np.uint64(1)))  # [count], one key an epoch
        offsets = _mix(~keys) % np.uint64(slack + 1)
        return (offsets + permute(places, keys, windows) * np.uint64(self.block_size)).astype(np.int64)
