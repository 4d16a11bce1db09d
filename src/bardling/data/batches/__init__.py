"""From a sample number to a batch: the data order, skipped ranges, document bounds, and the prefetching loader."""
