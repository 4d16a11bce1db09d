"""How the processes of a run share its work."""

from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import require_at_least


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of several processes: their number along each axis of the device mesh. A run may resume with any other layout."""

    layout: Literal["auto", "ddp", "fsdp"] = "auto"
    """Processes that the sizes below leave open: 'ddp' copies the model to each of them, 'fsdp' shards it; auto: what fits."""
    replicate: int | None = None
    """Copies of the model that train on different samples (DDP; with shard, HSDP); unset: as layout says."""
    shard: int | None = None
    """Processes that share weights, gradients and optimizer state, and train on different samples (FSDP2); unset: as above."""
    tensor: int | None = None
    """Processes that each compute a fraction of every layer, for the same samples (tensor and sequence parallelism; best among
    the GPUs of one machine); unset: 1, or more where a single layer is too large for a device."""
    context: int = 1
    """Processes that each compute a part of every sequence, for contexts that one device cannot hold; weights are sharded among
    them, too."""
    pipeline: int = 1
    """Stages of a pipeline: each process holds some of the layers. The passes of a step are in it together; use several."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """With pipeline: '1f1b' runs backward passes as soon as possible; 'gpipe' after all forward passes, with more memory."""
    reshard: bool | None = None
    """With shard: free a block's gathered weights after its forward pass, and gather them again for the backward pass; unset:
    only if all do not fit in memory."""
    accumulate: Literal["auto", "whole", "shards"] = "auto"
    """With shard: gradients between the passes of a step: 'whole' saves communication, 'shards' saves memory."""
    offload: bool = False
    """With shard, on CUDA: keep weights, gradients and optimizer state in host memory."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "parallel", "replicate", "shard", "tensor", "context", "pipeline")
