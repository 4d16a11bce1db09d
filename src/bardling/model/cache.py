"""Keys and values of the tokens a model has seen, so that generation computes each token once.

The token at position p of a row is stored in slot p, so rows of different lengths share one cache: each has its own length, and
a mask hides what lies beyond it. If all rows are equally long, the usual case, there is no mask and writing is one copy.
Lengths are plain integers, so nothing waits for the device. Keys are stored as they are scored: normed and, with rotary
positions, rotated. Layers with a sliding window also keep all their tokens; a second mask hides those that are too old.

Limits: inference only. Slots beyond a row's length hold zeros or stale, finite values, which are never read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.model.kernels.attention import within_window


@dataclass(frozen=True)
class CacheStep:
    """Where the tokens of one forward pass go: the same for every layer."""

    positions: Tensor  # [T] if rows are equally long, else [B, T]
    start: int | None  # common first slot; None if rows differ
    end: int  # one past the last slot that any row uses
    mask: Tensor | None  # [B or 1, 1, T, end], true where a query sees a key; None where none is needed
    causal: bool  # the plain causal mask applies
    window_mask: Tensor | None  # the mask of layers with a sliding window; None where the window hides nothing

    def mask_for(self, window: int | None) -> tuple[Tensor | None, bool]:
        """Mask of a layer, and whether the plain causal mask applies instead."""
        return (self.mask, self.causal) if window is None or self.window_mask is None else (self.window_mask, False)


class KVCache:
    """Keys and values of `batch` rows, allocated at the first write, when dtype and device are known.

    `lengths[b]` is the number of valid tokens of row b; a caller may lower it to discard a row's last tokens. Memory may hold
    more rows than are in use, and grows with `append` and `reserve`.
    """

    def __init__(self, config: ModelConfig, batch: int, *, capacity: int | None = None) -> None:
        self.config = config
        self.capacity = min(capacity or config.block_size, config.block_size)
        self.layers = config.n_layer  # of which this cache holds keys and values; may be changed before the first write
        self.lengths = [0] * batch
        self.keys: Tensor | None = None  # [layers, B or more, n_kv_head, capacity, head_dim]
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def next_step(self, batch: int, time: int, device: torch.device) -> CacheStep:
        """Lay out `time` new tokens after each row's last.

        Raises:
            ValueError: the batch size differs from the cache's, or a row would exceed the capacity.
        """
        if batch != len(self.lengths):
            raise ValueError(f"{batch} rows of tokens for a cache of {len(self.lengths)} rows")
        end = self.length + time
        if end > self.capacity:
            raise ValueError(f"{self.length} cached and {time} new tokens exceed the cache's capacity of {self.capacity}")
        steps, slots = torch.arange(time, device=device), torch.arange(end, device=device)
        window, equal = self.config.sliding_window, min(self.lengths) == self.length
        positions = (self.length if equal else torch.tensor(self.lengths, device=device)[:, None]) + steps  # [T] or [B, T]
        queries, shape = positions[..., None], (-1, 1, time, end)  # [B or 1, 1, T, S]
        mask = window_mask = None
        if not equal or (self.length > 0 and time > 1):
            mask = (slots <= queries).view(shape)
        if window is not None and (not equal or end > window):
            window_mask = within_window(queries, slots, window).view(shape)
        causal = equal and self.length == 0 and time > 1
        return CacheStep(positions, self.length if equal else None, end, mask, causal, window_mask)

    def write(self, layer: int, step: CacheStep, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [B, K, T, D]; return those that the queries may see [B, K, S, D]."""
        if self.keys is None or self.values is None:
            batch, heads, _, width = key.shape
            shape = (self.layers, batch, heads, self.capacity, width)
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.keys[layer, : key.size(0)], self.values[layer, : key.size(0)]
        if step.start is not None:
            keys[:, :, step.start : step.end] = key
            values[:, :, step.start : step.end] = value
        else:
            rows = torch.arange(key.size(0), device=key.device)[:, None]
            keys[rows, :, step.positions] = key.transpose(1, 2)  # [B, T, K, D]
            values[rows, :, step.positions] = value.transpose(1, 2)
        return keys[:, :, : step.end], values[:, :, : step.end]

    def advance(self, time: int) -> None:
        """Count `time` tokens as seen in every row, after all layers have written theirs."""
        self.lengths = [length + time for length in self.lengths]

    def row(self, index: int) -> "KVCache":
        """A cache of one row that shares this one's memory but not its lengths; no memory before this cache is written to."""
        view = KVCache(self.config, 1, capacity=self.capacity)
        view.lengths = [self.lengths[index]]
        if self.keys is not None and self.values is not None:
            view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        return view

    def copy(self, index: int, length: int, capacity: int) -> "KVCache":
        """A cache of one row with the first `length` tokens of a row of this one, in memory of its own."""
        copied = KVCache(self.config, 1, capacity=capacity)
        copied.lengths = [length]
        if self.keys is not None and self.values is not None:
            layers, _, heads, _, width = self.keys.shape
            shape = (layers, 1, heads, copied.capacity, width)
            copied.keys, copied.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
            copied.keys[:, 0, :, :length] = self.keys[:, index, :, :length]
            copied.values[:, 0, :, :length] = self.values[:, index, :, :length]
        return copied

    def append(self, other: "KVCache", index: int) -> None:
        """Add a row: a copy of a row of another cache."""
        place, used = len(self.lengths), other.lengths[index]
        self.reserve(used, place + 1)
        self.lengths.append(used)
        if other.keys is None or other.values is None:
            return
        if self.keys is None or self.values is None:
            layers, _, heads, _, width = other.keys.shape
            shape = (layers, place + 1, heads, self.capacity, width)
            self.keys, self.values = other.keys.new_zeros(shape), other.values.new_zeros(shape)
        self.keys[:, place, :, :used] = other.keys[:, index, :, :used]
        self.values[:, place, :, :used] = other.values[:, index, :, :used]

    def reserve(self, capacity: int, rows: int = 0) -> None:
        """Make room for at least this many tokens in each row, and for this many rows."""
        self.capacity = max(self.capacity, min(capacity, self.config.block_size))
        if self.keys is None or self.values is None:
            return
        layers, had_rows, heads, had_slots, width = self.keys.shape
        if rows <= had_rows and self.capacity <= had_slots:
            return
        rows = had_rows if rows <= had_rows else max(rows, 2 * had_rows)  # doubling bounds the copies of a growing batch
        shape = (layers, rows, heads, max(self.capacity, had_slots), width)
        keys, values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        keys[:, :had_rows, :, :had_slots], values[:, :had_rows, :, :had_slots] = self.keys, self.values
        self.keys, self.values = keys, values

    def drop(self, index: int) -> None:
        """Remove a row; the last row takes its place. Its memory is kept for rows to come."""
        used = self.lengths[index] = self.lengths[-1]
        self.lengths.pop()
        last = len(self.lengths)
        if self.keys is not None and self.values is not None and index != last:
            self.keys[:, index, :, :used] = self.keys[:, last, :, :used]
            self.values[:, index, :, :used] = self.values[:, last, :, :used]
