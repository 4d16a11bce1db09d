"""GPT-2's initial weights, the same however and wherever the model is built.

Every parameter is drawn from its own generator, seeded by a hash of (seed, parameter name), on the CPU in float32. A model
therefore starts alike whole or sharded, made directly or on the meta device first, whatever order its parameters are visited
in, and whatever the padding of its vocabulary.

Method (Radford et al. 2019 and the released code): N(0, 0.02) for matrices and embeddings; the projections back into the
residual stream N(0, 0.02 / sqrt(2 n_layer)), since 2 n_layer of them add up; biases 0, norms 1.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.errors import UserError

STD = 0.02
"""Standard deviation of GPT-2's initial matrices."""


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter's generator: 63 bits of a hash of (seed, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial float32 value of the parameter `name` of a `GPT(config)`, on the CPU.

    Rows of the token embedding beyond `config.vocab_size` are zero.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu")
    if ".ln_" in name:
        return torch.ones(shape, device="cpu")
    std = STD / math.sqrt(2 * config.n_layer) if name.endswith(".c_proj.weight") else STD
    generator = torch.Generator("cpu").manual_seed(parameter_seed(seed, name))
    if name.endswith(".wte.weight"):
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
    if not 1 <= block_size <= positions.size(0):
        raise UserError(
            f"model.block_size = {block_size}: the weights have {positions.size(0)} positions; "
            f"choose a block_size from 1 to {positions.size(0)}"
        )
    return positions[:block_size].clone()


def crop_block_size(state: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """A state dict (weights, or one kind of moments, by parameter name) with its positions cropped to `block_size`; rest as it
    is.

    Raises:
        UserError: the state has fewer positions.
    """
    return {name: crop_positions(value, block_size) if name == POSITIONS else value for name, value in state.items()}
