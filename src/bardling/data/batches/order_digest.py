"""A digest of the samples that a run has seen: two runs with equal digests have seen the same data in the same order.

It is the sum modulo 2^64 of a hash of each sample's number, position and length. It therefore depends on the samples alone, not
on their division into steps, processes and passes, nor on restarts. It is brought up to date when it is needed, at the cost of
computing the order of the samples since the last time once more (some tenths of a microsecond per sample).

Limits: it covers positions in the training split, whose tokens the dataset's fingerprint identifies; the hash detects
differences, not forgeries.
"""

import string
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bardling.data.batches.order import GOLDEN, DataOrder, mix

_MASK = (1 << 64) - 1
_CHUNK = 1 << 16  # samples hashed at once


@dataclass(frozen=True)
class OrderDigest:
    """The digest of samples `first` to `end` - 1."""

    first: int = 0
    end: int = 0
    value: int = 0
    order: DataOrder | None = None  # of the samples that follow

    def upto(self, end: int) -> "OrderDigest":
        """The digest of samples `first` to `end` - 1, for an `end` that is not before this one's."""
        total = self.value
        for begin in range(self.end, end, _CHUNK):
            assert self.order is not None
            size = min(_CHUNK, end - begin)
            numbers = mix(np.arange(begin, begin + size, dtype=np.uint64) + np.uint64(GOLDEN))
            positions = mix(numbers ^ self.order.starts(begin, size).astype(np.uint64))
            total += int(mix(positions ^ np.uint64(self.order.block_size)).sum(dtype=np.uint64))
        return replace(self, end=end, value=total & _MASK)

    def __str__(self) -> str:
        return f"{self.value:016x}"

    def as_json(self) -> dict[str, Any]:
        return {"first": self.first, "value": str(self)}

    @staticmethod
    def from_json(values: Any, end: int) -> "OrderDigest":
        """The inverse of `as_json`; raises a `ValueError` for anything else."""
        first, value = (values.get(name) if isinstance(values, dict) else None for name in ("first", "value"))
        valid = type(first) is int and 0 <= first <= end and isinstance(value, str) and len(value) == 16
        if not valid or not set(str(value)) <= set(string.hexdigits):
            raise ValueError(f"order_digest = {str(values)[:80]!r}")
        return OrderDigest(first if isinstance(first, int) else 0, end, int(str(value), 16))
