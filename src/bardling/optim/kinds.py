"""What part of the model a parameter is, which decides who updates it, and the bytes that the optimizer keeps for it.

Both follow from names and shapes alone, so that a plan needs neither a model nor PyTorch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from bardling.config import OptimConfig

Kind = Literal["embedding", "head", "vector", "matrix", "other"]

_BLOCK = re.compile(r"(^|\.)h\.\d+\.")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|wve)\.([\w.]+\.)?weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_FLOAT32 = 4  # bytes


def kind_of(name: str, dimensions: int) -> Kind:
    """What a parameter is, for Muon: 'matrix' is what Muon takes."""
    if _EMBEDDING.search(name):
        return "embedding"
    if _HEAD.search(name):
        return "head"
    if dimensions < 2:
        return "vector"
    return "matrix" if dimensions == 2 and _BLOCK.search(name) else "other"


def optimizer_bytes(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> int:
    """Bytes of the optimizer's float32 state: AdamW keeps two moments of each number and a step count for each tensor, Muon one
    moment of each number of its matrices.

    Args:
        shapes: of the trained parameters, by name.
    """
    total = 0
    for name, shape in shapes.items():
        muon = config.name == "muon" and kind_of(name, len(shape)) == "matrix"
        total += math.prod(shape) * _FLOAT32 if muon else (2 * math.prod(shape) + 1) * _FLOAT32
    return total
