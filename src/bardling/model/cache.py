"""Keys and values of the tokens a model has seen, so that generation computes each token once.

The cache is allocated once, [n_layer, batch, n_kv_head, capacity, head_dim]. A token at position p of its row lies in slot p,
so rows of different lengths share one cache: each has its own length, and a mask hides what lies beyond it. When all rows are
equally long, which is the usual case, there is no mask and writing is one copy. Lengths are plain integers, so nothing waits
for the device. Keys are kept as they are scored: normed and, with rotary positions, turned.

Layers with a sliding window keep all their tokens too, and a second mask hides those that are too old.

Limits: inference only. Slots beyond a row's length hold zeros or stale, finite values; nothing reads them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.model.attend import band


@dataclass(frozen=True)
class CacheStep:
    """Where the tokens of one forward pass go: the same for every layer."""

    positions: Tensor  # [T] when rows are equally long, else [B, T]
    start: int | None  # common first slot; None when rows differ
    end: int  # one past the last slot that any row uses
    mask: Tensor | None  # [B or 1, 1, T, end], True where a query may look; None when `causal` says it all
    causal: bool  # the plain causal mask applies
    near: Tensor | None = None  # the mask of layers with a sliding window; None where the window hides nothing

    def view(self, window: int | None) -> tuple[Tensor | None, bool]:
        """Mask of a layer, and whether the plain causal mask applies instead."""
        return (self.mask, self.causal) if window is None or self.near is None else (self.near, False)


class KVCache:
    """Preallocated keys and values for `batch` rows.

    Memory comes with the first write, when dtype and device are known. `lengths[b]` is the number of valid tokens of row b; a
    caller may lower it to forget a row's last tokens.
    """

    def __init__(self, config: ModelConfig, batch: int, *, capacity: int | None = None) -> None:
        self.config = config
        self.capacity = min(capacity or config.block_size, config.block_size)
        self.lengths = [0] * batch
        self.keys: Tensor | None = None  # [n_layer, B, n_kv_head, capacity, head_dim]
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def plan(self, batch: int, time: int, device: torch.device) -> CacheStep:
        """Lay out `time` new tokens after each row's last.

        Raises:
            ValueError: the batch is not the cache's, or a row would outgrow the capacity.
        """
        if batch != len(self.lengths):
            raise ValueError(f"{batch} rows of tokens for a cache of {len(self.lengths)} rows")
        end = self.length + time
        if end > self.capacity:
            raise ValueError(f"{self.length} cached and {time} new tokens exceed the cache's capacity of {self.capacity}")
        steps = torch.arange(time, device=device)
        slots = torch.arange(end, device=device)
        window = self.config.sliding_window
        if min(self.lengths) == self.length:
            start = self.length
            positions = start + steps  # [T]
            mask = near = None
            if start > 0 and time > 1:
                mask = (slots <= positions[:, None])[None, None]  # [1, 1, T, S]
            if window is not None and end > window:
                near = band(positions[:, None], slots, window)[None, None]
            return CacheStep(positions, start, end, mask, causal=start == 0 and time > 1, near=near)
        positions = torch.tensor(self.lengths, device=device)[:, None] + steps  # [B, T]
        mask = (slots <= positions[:, :, None])[:, None]  # [B, 1, T, S]
        near = None if window is None else band(positions[:, :, None], slots, window)[:, None]
        return CacheStep(positions, None, end, mask, causal=False, near=near)

    def write(self, layer: int, step: CacheStep, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values [B, K, T, D]; return all that the queries may look at [B, K, S, D]."""
        if self.keys is None or self.values is None:
            batch, heads, _, width = key.shape
            shape = (self.config.n_layer, batch, heads, self.capacity, width)
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.keys[layer], self.values[layer]
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
        """A cache of one row that shares this one's memory; its lengths are its own. Empty until this cache was written to."""
        view = KVCache(self.config, 1, capacity=self.capacity)
        view.lengths = [self.lengths[index]]
        if self.keys is not None and self.values is not None:
            view.keys, view.values = self.keys[:, index : index + 1], self.values[:, index : index + 1]
        return view

    def drop(self, index: int) -> None:
        """Remove a row: the last row takes its place."""
        last = len(self.lengths) - 1
        if self.keys is not None and self.values is not None:
            if index != last:
                used = self.lengths[last]
                self.keys[:, index, :, :used] = self.keys[:, last, :, :used]
                self.values[:, index, :, :used] = self.values[:, last, :, :used]
            self.keys, self.values = self.keys[:, :last], self.values[:, :last]
        self.lengths[index] = self.lengths[last]
        del self.lengths[last]
