"""What tensor parallelism divides in a model, as a table: which parameters, along which dimension, in which parts.

Each process of a tensor group has a fraction of the heads, of the MLP's hidden channels and of the vocabulary (Shoeybi et al.
2019, Megatron-LM, arXiv:1909.08053). Each part of a fused matrix (queries, keys and values; SwiGLU's gate and values) is
divided by itself, so that a process has whole heads, and values with their gates. Parameters that are not in the table are
the same in all processes. `distributed/tensor.py` applies the table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.planning.parameter_shapes import matrix_rows, parameter_shapes


class Split(NamedTuple):
    """How a parameter is divided: each of its parts into equal fractions."""

    dim: int  # 0: outputs or ids; 1: inputs, or the channels of an embedding
    parts: tuple[int, ...]  # sizes along `dim`

    def fraction(self, whole: Tensor, rank: int, count: int) -> Tensor:
        """What process `rank` of `count` has of a whole parameter."""
        parts = torch.split(whole, list(self.parts), self.dim)
        return torch.cat([part.chunk(count, self.dim)[rank] for part in parts], self.dim)

    def join(self, fractions: Sequence[Tensor]) -> Tensor:
        """The inverse: the whole parameter from the fractions of all processes."""
        sizes = [size // len(fractions) for size in self.parts]
        parts = zip(*(torch.split(fraction, sizes, self.dim) for fraction in fractions), strict=True)
        return torch.cat([piece for part in parts for piece in part], self.dim)


def tensor_splits(config: ModelConfig) -> dict[str, Split]:
    """The parameters of a `GPT(config)` that are divided, by name."""
    arch, rows = config.architecture, {layer: tuple(parts.values()) for layer, parts in matrix_rows(config).items()}
    table = {
        "attn.c_attn.weight": Split(0, rows["attn.c_attn"]),
        "attn.c_attn.bias": Split(0, rows["attn.c_attn"]),
        "attn.c_proj.weight": Split(1, (arch.query_width,)),
        "mlp.c_fc.weight": Split(0, rows["mlp.c_fc"]),
        "mlp.c_fc.bias": Split(0, rows["mlp.c_fc"]),
        "mlp.c_proj.weight": Split(1, (arch.mlp_hidden,)),
        "wte.weight": Split(0, (config.padded_vocab_size,)),
        "lm_head.weight": Split(0, (config.padded_vocab_size,)),
        **{f"wve.{table}.weight": Split(1, (arch.kv_width,)) for table in range(arch.value_embeddings)},
    }
    names = parameter_shapes(config)
    return {name: split for name in names for suffix, split in table.items() if f".{name}".endswith(f".{suffix}")}
