"""From a sample number to a batch: the data order, mixtures, skipped ranges, document bounds, and the prefetching loader."""

IGNORE = -100
"""Target excluded from every loss: PyTorch's default `ignore_index`."""
