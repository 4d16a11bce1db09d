"""Which implementation of an operation runs: every rule on device, dtype, shape and compilation.

The other modules of this folder do not look at devices themselves. Thresholds that the memory estimate also needs are in
`planning/`.
"""

from typing import Literal

import torch
from torch import Tensor

from bardling.planning.costs import EXPLICIT_LENGTH, RECAST_MIN_ELEMENTS

_COMPILED_EXPLICIT_LENGTH = 256  # compiled code does not split queries into blocks, so longer contexts use the fused kernel
_FEW_ROWS = {  # batch sizes for which `few_rows_linear` is faster, by what multiplies: see `few_rows_kernel`
    "mkl": range(7, 33),
    "onednn": range(4, 33),
    "bfloat16": range(1, 33),
}
_PACKED_ROWS = range(3, 17)  # batch sizes for which matrices packed in advance are faster
_INT8_ROWS = 28  # up to which the fused kernel for int8 weights is faster


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of `x`: autocast's where it applies, which is not to float64."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_eager_cpu(x: Tensor) -> bool:
    """Whether operators run one by one on a CPU, so that each extra pass over memory costs time. Compiled code fuses passes."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def linear_kernel(x: Tensor, weight: Tensor, fp8: bool) -> Literal["plain", "few rows", "recast", "fp8"]:
    """How to compute x @ weight.T. Float8 applies to training only, so that validation measures the weights as others use
    them."""
    if not torch.is_grad_enabled():
        few = x.dim() == 3 and x.size(1) == 1 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return "few rows" if few and x.size(0) in _FEW_ROWS.get(few_rows_kernel(x), ()) else "plain"
    if fp8:
        return "fp8"
    large = weight.numel() >= RECAST_MIN_ELEMENTS and is_eager_cpu(x)
    cast = x.dtype != torch.float64 and (torch.is_autocast_enabled("cpu") or weight.dtype != x.dtype)
    return "recast" if large and cast else "plain"


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def few_rows_kernel(x: Tensor) -> Literal["mkl", "onednn", "bfloat16", "none"]:
    """What multiplies in `few_rows_linear`. PyTorch's product of float32 matrices is MKL's, which copies the large operand to
    another layout first, unless there is a single row; oneDNN does not, but is measured only with AVX-512. It also computes
    PyTorch's products in bfloat16, for which F.linear has it copy the weights."""
    if x.dtype == torch.bfloat16:
        return "bfloat16"
    if x.dtype != torch.float32:
        return "none"
    has_onednn = _has_onednn() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "onednn" if has_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" else "mkl"


def packs_rows(rows: int, device: torch.device) -> bool:
    """Whether matrices packed in advance make steps of this many rows faster."""
    return device.type == "cpu" and rows in _PACKED_ROWS and few_rows_kernel(torch.empty(0)) == "onednn"


def int8_kernel(x: Tensor) -> Literal["fused", "dequantized"]:
    """How to multiply activations with int8 weights: by a kernel that converts them as it reads them, or after converting them.
    The kernel takes 16 channels at a time and reads beyond the end of a row that is not a multiple of them."""
    fused = x.device.type == "cpu" and has_int8_kernel() and x.size(-1) % 16 == 0
    return "fused" if fused and x.numel() <= _INT8_ROWS * x.size(-1) else "dequantized"


def has_int8_kernel() -> bool:
    """Whether this CPU multiplies with int8 weights fast: measured with AVX-512 only."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch, "_weight_int8pack_mm")


def attention_kernel(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool
) -> Literal["fused", "explicit", "explicit compiled"]:
    """How to compute attention: explicit scores pay for bfloat16 on a CPU up to a few hundred tokens."""
    supported = causal if mask is None else mask.dtype == q.dtype and k.size(2) == q.size(2)
    if not supported or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return "fused"
    if torch.compiler.is_compiling():
        return "explicit compiled" if q.size(2) <= _COMPILED_EXPLICIT_LENGTH else "fused"
    return "explicit" if q.size(2) <= EXPLICIT_LENGTH else "fused"


def shares_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel takes fewer key heads than query heads. On CUDA only the 16-bit kernels without a mask do;
    otherwise PyTorch would fall back to a kernel that stores all scores."""
    return not (q.is_cuda and (mask is not None or q.dtype == torch.float32))


def head_rows(weight: Tensor, vocab_size: int) -> int:
    """Rows of the head that are multiplied: those that pad the vocabulary make products faster except on a CPU."""
    return vocab_size if weight.device.type == "cpu" else weight.size(0)


def has_wide_products(x: Tensor) -> bool:
    """Whether products of 16-bit matrices can return their float32 sums unrounded, and products of float8 matrices run in
    hardware (compute capability 8.9 and newer) rather than in emulation."""
    return x.is_cuda
