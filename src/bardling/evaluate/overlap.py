"""How much of a text occurs in the training data, which makes its loss better than that of new text.

The text is cut into pieces of 32 tokens, and each is looked up among all sequences of 32 consecutive training tokens by a
polynomial hash modulo 2^64. Limits: only the first 100 million training tokens are read.
"""

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from bardling.data.tokens.shards import TokenSplit

MOST_TOKENS = 100_000_000
_PIECE = 32  # tokens
_READ = 1 << 22  # training tokens at once
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no digit of the hash is lost


def training_overlap(text: TokenSplit, training: TokenSplit) -> float:
    """The fraction of the pieces of `text` that occur in `training`; a text shorter than a piece is one."""
    size = min(_PIECE, len(text))
    pieces = _hashes(sliding_window_view(text.read(0, len(text)), size)[::size])
    found = np.zeros(len(pieces), bool)
    end = min(len(training), MOST_TOKENS)
    for start in range(0, end - size + 1, _READ):
        tokens = training.read(start, min(_READ + size - 1, end - start))
        found |= np.isin(pieces, _hashes(sliding_window_view(tokens, size)))
    return float(found.mean()) if len(found) else 0.0


def _hashes(sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of each row of `sequences` [N, size]: [N]."""
    hashes = np.zeros(len(sequences), np.uint64)
    for tokens in sequences.T:
        hashes = hashes * _FACTOR + tokens.astype(np.uint64) + np.uint64(1)
    return hashes
