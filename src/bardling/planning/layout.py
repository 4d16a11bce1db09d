"""Layout of a run's processes: the sizes of the device mesh axes."""

import math
from dataclasses import astuple, dataclass

AXES = ("replicate", "shard", "tensor", "pipeline")
"""Mesh axes, outermost first: neighbouring ranks, which have the fastest links, differ along the innermost axes."""

DATA_AXES = ("replicate", "shard")
"""Axes along which processes train on different samples."""


@dataclass(frozen=True)
class Layout:
    """Processes along each axis of the mesh; an unused axis has size 1. So far, runs use only the first."""

    replicate: int = 1  # each holds all parameters (DDP)
    shard: int = 1  # each holds a shard of every parameter (FSDP2)
    tensor: int = 1  # each computes a fraction of every layer
    pipeline: int = 1  # each computes some of the layers

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return astuple(self)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_size(self) -> int:
        """Number of processes that train on different samples."""
        return self.replicate * self.shard
