"""Initial weights: GPT-2's, with a few settings; the same however and wherever the model is built.

Every parameter is drawn from its own generator, seeded by a hash of (seed, parameter name), on the CPU in float32. A model
therefore starts alike whole or sharded, made directly or on the meta device first, whatever order its parameters are visited
in, and whatever the padding of its vocabulary.

Method (Radford et al. 2019 and the released code): N(0, 0.02) for matrices and embeddings; the projections back into the
residual stream N(0, 0.02 / sqrt(2 n_layer)), since 2 n_layer of them add up; biases 0, norms 1. `init_std` replaces 0.02, and
`zero_init` makes these projections 0. Value embeddings are drawn as large as the values that they are mixed with, half and
half.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.errors import UserError


def is_value_table(name: str) -> bool:
    """Whether a parameter is a table of value embeddings."""
    return name.startswith("transformer.wve.")


def has_vocabulary_rows(name: str) -> bool:
    """Whether a parameter has a row for each token, and rows of padding."""
    return name in ("transformer.wte.weight", "lm_head.weight") or is_value_table(name)


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter's generator: 63 bits of a hash of (seed, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial float32 value of the parameter `name` of a `GPT(config)`, on the CPU.

    Rows of embeddings and head beyond `config.vocab_size` are zero.
    """
    projection = name.endswith(".c_proj.weight")
    if name.endswith(".bias") or (projection and config.zero_init):
        return torch.zeros(shape, device="cpu")
    if ".ln_" in name:
        return torch.ones(shape, device="cpu")
    if name.endswith(".value_mix"):
        return torch.full(shape, 0.5, device="cpu")
    std = config.init_std / math.sqrt(2 * config.n_layer) if projection else config.init_std
    if is_value_table(name):
        std *= math.sqrt(config.n_embd)  # the spread of a product of c_attn with a normed input
    generator = torch.Generator("cpu").manual_seed(parameter_seed(seed, name))
    if has_vocabulary_rows(name):
        value = torch.zeros(shape, device="cpu")
        value[: config.vocab_size] = torch.normal(0.0, std, (config.vocab_size, shape[1]), generator=generator, device="cpu")
        return value
    return torch.normal(0.0, std, tuple(shape), generator=generator, device="cpu")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Set every parameter of a `GPT` (on any device but meta) to its initial value."""
    config = model.config
    assert isinstance(config, ModelConfig)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))


POSITIONS = "transformer.wpe.weight"
"""Name of the learned positions [block_size, n_embd]."""


def crop_positions(positions: Tensor, block_size: int) -> Tensor:
    """The first `block_size` rows of learned positions, or of an optimizer's moments of them, as a tensor of its own.

    Raises:
        UserError: there are fewer rows.
    """
    require_positions(block_size, positions.size(0))
    return positions[:block_size].clone()


def require_positions(block_size: int, have: int) -> None:
    """Raise a UserError unless a model of `have` positions can be cropped to `block_size`."""
    if not 1 <= block_size <= have:
        raise UserError(
            f"model.block_size = {block_size}: the weights have {have} positions; choose a block_size from 1 to {have}"
        )


def crop_block_size(state: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """A state dict (weights, or one kind of moments, by parameter name) with its positions cropped to `block_size`; rest as it
    is.

    Raises:
        UserError: the state has fewer positions.
    """
    return {name: crop_positions(value, block_size) if name == POSITIONS else value for name, value in state.items()}
