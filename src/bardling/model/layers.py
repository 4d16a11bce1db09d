"""Layers with parameters: linear layers, embeddings and RMSNorm.

Linear layers and embeddings leave their memory uninitialised: `init_weights` draws every parameter, and drawing twice costs
seconds on large models. The computations are in `model/kernels/`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config.architecture import Architecture
from bardling.model.kernels.elementwise import rms_norm
from bardling.model.kernels.int8 import Int8Weight, int8_linear
from bardling.model.kernels.linear import linear, pack, packed_linear
from bardling.planning.costs import FP8_MULTIPLE


class Linear(nn.Linear):
    """A linear layer; with `fp8`, passes with gradients run in float8 (`model/kernels/fp8.py`)."""

    fp8 = False
    adapter: nn.Module | None  # of LoRA: see `model/lora.py`

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.register_module("adapter", None)

    def reset_parameters(self) -> None:
        """Leave the memory uninitialised."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias, fp8=self.fp8)
        return y if self.adapter is None else self.adapter(x, y)


def use_fp8(blocks: nn.Module, wanted: bool = True) -> None:
    """Make the linear layers of `blocks` compute in float8, if wanted and where their sizes allow it."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.fp8 = wanted and not (module.in_features % FP8_MULTIPLE or module.out_features % FP8_MULTIPLE)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, for inference; it stays on its device."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__()
        for name, value in zip(Int8Weight._fields, weight, strict=True):
            self.register_buffer(name, value, persistent=False)  # for those who count a model's memory
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A float32 linear layer for inference of `rows` rows with one token each on a CPU; only the packed matrix is kept."""

    def __init__(self, layer: Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = pack(layer.weight, rows), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """An embedding of ids [B, T] -> [B, T, C]."""

    adapter: nn.Module | None  # trains some rows only: see `model/lora.py`

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_module("adapter", None)

    def reset_parameters(self) -> None:
        """Leave the memory uninitialised."""

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        """With a `table`, a view made by `tied_views`, look ids up there; its gradient may be sparse."""
        sparse = table is not None and not torch.compiler.is_compiling()
        return F.embedding(ids, adapted(self) if table is None else table, sparse=sparse)


def adapted(layer: Linear | Embedding) -> Tensor:
    """The matrix of an embedding or a head, with the rows that its adapter trains."""
    weight: Tensor = layer.weight if layer.adapter is None else layer.adapter(layer.weight)
    return weight


class RMSNorm(nn.Module):
    """RMSNorm over the last `width` channels, with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose weights may be of lower precision than its input, as where they are gathered for a pass."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(arch: Architecture) -> nn.Module:
    """The norm of the residual stream."""
    rms = arch.norm == "rmsnorm"
    return RMSNorm(arch.n_embd, arch.norm_eps) if rms else LayerNorm(arch.n_embd, eps=arch.norm_eps, bias=arch.bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout`, without drawing random numbers when `p` is 0."""
    return F.dropout(x, p) if p else x
