"""Initial weights: GPT-2's, with a few settings; the same however and wherever the model is built.

Every parameter is drawn from its own generator, seeded by a hash of (seed, parameter name), on the CPU in float32. The initial
weights therefore do not depend on sharding, on the device (the meta device included), on the order of the parameters or on the
padding of the vocabulary.

Method (Radford et al. 2019 and the released code): N(0, 0.02) for matrices and embeddings; N(0, 0.02 / sqrt(2 n_layer)) for the
projections back into the residual stream, since 2 n_layer of them add up; biases 0, norms 1. `init_std` replaces 0.02, and
`zero_init` sets these projections to 0. Value embeddings have the standard deviation of the values that they are mixed with in
equal parts.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.errors import UserError

_FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}


def has_vocabulary_rows(name: str) -> bool:
    """Whether a parameter has a row for each id of the padded vocabulary."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("transformer.wve.")


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU, seeded by 63 bits of a hash of (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial float32 value of the parameter `name` of a `GPT(config)`, on the CPU.

    Rows of embeddings and head beyond `config.vocab_size` are zero.
    """
    projection = name.endswith(".c_proj.weight")
    if name.endswith(".bias") or (projection and config.zero_init):
        return torch.zeros(shape, **_FLOAT32)
    if ".ln_" in name:
        return torch.ones(shape, **_FLOAT32)
    if name.endswith(".value_mix"):
        return torch.full(shape, 0.5, **_FLOAT32)
    std = config.init_std / math.sqrt(2 * config.n_layer) if projection else config.init_std
    if name.startswith("transformer.wve."):
        std *= math.sqrt(config.n_embd)  # standard deviation of c_attn's product with a normed input
    value, rows = torch.zeros(shape, **_FLOAT32), config.vocab_size if has_vocabulary_rows(name) else shape[0]
    value[:rows].normal_(0.0, std, generator=named_generator(seed, name))
    return value


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Set every parameter of a `GPT` (on any device but meta) to its initial value."""
    config = model.config
    assert isinstance(config, ModelConfig)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))


def extend_vocabulary(state: Mapping[str, Tensor], old: int, new: int, rows: int) -> dict[str, Tensor]:
    """A state dict for `new` tokens instead of `old`, in tables of at least `rows` rows.

    New tokens have the mean of the old rows (Hewitt 2021, "Initializing new word embeddings for pretrained language models"),
    also where the tables have spare rows for them. Rows that are added as padding are zero.
    """
    extended = dict(state)
    for name, table in state.items():
        if has_vocabulary_rows(name):
            extended[name] = table.new_zeros(max(rows, len(table)), table.size(1))
            extended[name][: len(table)] = table
            extended[name][old:new] = table[:old].float().mean(0).to(table.dtype)
    return extended


def crop_block_size(tensors: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Copy the first `block_size` learned positions of a state dict, or their moments and weights among an optimizer's tensors.

    Raises:
        UserError: there are fewer.
    """

    def crop(positions: Tensor) -> Tensor:
        have = positions.size(0)
        if not 1 <= block_size <= have:
            raise UserError(
                f"model.block_size = {block_size}: the weights have {have} positions; set it to a value from 1 to {have}"
            )
        return positions[:block_size].clone()

    learned = "transformer.wpe.weight"  # [block_size, n_embd]
    return {name: crop(value) if learned in name and value.ndim else value for name, value in tensors.items()}
