"""Baselines for a language model: what general-purpose compressors reach on the same validation text."""

import gzip
import lzma

from bardling.data.tokens.conversations import ANSWER
from bardling.data.tokens.shards import TokenDataset

# Longer texts take minutes to compress and are skipped.
MAX_TEXT = 64 << 20  # tokens, and bytes


def compressor_bits_per_byte(dataset: TokenDataset) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the concatenated validation text; empty if it is longer than `MAX_TEXT`."""
    split, tokenizer = dataset.split("val"), dataset.tokenizer
    if tokenizer is None or not 0 < len(split) <= MAX_TEXT:
        return {}
    ids = split.read(0, len(split))
    if split.marks is not None:  # of rows, what is learned: each document once, without padding
        ids = ids[split.marks.read(0, len(split)) & ANSWER > 0]
    sizes = tokenizer.bytes_per_token()
    if ids.max() >= len(sizes):
        return {}  # tokens that the tokenizer cannot decode
    text = tokenizer.decode(ids[sizes[ids] > 0]).encode()
    if not text or len(text) > MAX_TEXT:
        return {}
    compressed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}
