"""Memory of one process during training: weights, gradients, optimizer state, EMA and activations.

A process is taken to hold the whole model; `planning/layout.py` divides it among several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bardling.config import ModelConfig, OptimConfig, RunConfig
from bardling.planning.activations import ActivationBytes, activation_bytes
from bardling.planning.costs import FLOAT32_BYTES, float32_bytes, weight_bytes
from bardling.planning.parameter_shapes import block_matrices, parameter_kind, trained_shapes


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one process during training (bytes)."""

    weights: int
    gradients: int
    optimizer: int
    activations: ActivationBytes
    trained: int  # of the weights, those that are trained
    ema: int = 0

    @property
    def total(self) -> int:
        """Peak memory."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations.total


def memory_plan(
    config: RunConfig, model: ModelConfig, micro_batch: int, precision: str, device_type: str, recompute: str | None = None
) -> MemoryPlan:
    """Estimate the memory of one process.

    Args:
        config: the recipe; `model` and `micro_batch` are its own with open values filled in.
        precision, device_type: as for `activation_bytes`.
        recompute: None for the recipe's.
    """
    weights, trained = weight_bytes(model), trained_shapes(model, config.tune)
    size = float32_bytes(trained)
    if config.tune.lora_rank:
        weights += size
    if config.tune.base_dtype == "bfloat16":
        matrices = {name: shape[::-1] for name, shape in block_matrices(model).items()}
        weights -= model.n_layer * float32_bytes(matrices) // 2
    return MemoryPlan(
        weights=weights,
        gradients=size * (2 if config.cuda_graphs and device_type == "cuda" else 1),  # a CUDA graph's own, and their sum
        optimizer=optimizer_bytes(trained, config.optim),
        trained=size,
        ema=size if config.optim.ema_decay else 0,
        activations=activation_bytes(
            model,
            micro_batch,
            precision=precision,
            device_type=device_type,
            recompute=recompute or config.train.recompute,
            document_mask=config.data.document_mask or config.data.packing == "documents",
            fp8=config.fp8,
        ),
    )


def optimizer_bytes(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> int:
    """Bytes of the float32 optimizer state: AdamW keeps two moments per element and a step count per tensor, Muon one moment
    per element of its matrices.

    Args:
        shapes: shapes of the trained parameters by name.
    """
    muon = {name for name, shape in shapes.items() if config.name == "muon" and parameter_kind(name, len(shape)) == "matrix"}
    values = (math.prod(shape) if name in muon else 2 * math.prod(shape) + 1 for name, shape in shapes.items())
    return sum(values) * FLOAT32_BYTES
