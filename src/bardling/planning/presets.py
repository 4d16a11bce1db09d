"""GPT-2 model sizes by name.

The four large ones are OpenAI's (Radford et al. 2019, with the widths of the released models); `gpt2-xs` and `gpt2-xxs` are for
experiments.
"""

from bardling.config import ModelConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.errors import UserError, closest

SIZES: dict[str, ModelConfig] = {
    name: ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, vocab_size=GPT2_VOCAB_SIZE)
    for name, n_layer, n_head, n_embd in [
        ("gpt2-xxs", 4, 4, 64),  # 3.5 million parameters
        ("gpt2-xs", 10, 8, 512),  # 57.8
        ("gpt2", 12, 12, 768),  # 124.4
        ("gpt2-medium", 24, 16, 1024),  # 354.8
        ("gpt2-large", 36, 20, 1280),  # 774.0
        ("gpt2-xl", 48, 25, 1600),  # 1557.6
    ]
}
"""Model configurations by name, smallest first."""

_ALIASES = {
    "gpt2-124m": "gpt2",
    "gpt2-350m": "gpt2-medium",
    "gpt2-355m": "gpt2-medium",
    "gpt2-774m": "gpt2-large",
    "gpt2-1558m": "gpt2-xl",
}


def size(name: str) -> ModelConfig:
    """The configuration of a model size: an entry of `SIZES`, or 'gpt2-124m', '-350m', '-355m', '-774m', '-1558m'.

    Raises:
        UserError: `name` is unknown.
    """
    config = SIZES.get(_ALIASES.get(name, name))
    if config is None:
        raise UserError(f"unknown model size {name!r}{closest(name, [*SIZES, *_ALIASES])}; choose from {', '.join(SIZES)}")
    return config
