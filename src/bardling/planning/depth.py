"""A compute-optimal run from its number of layers (`model.depth`), which determines every other size.

From depth L and the vocabulary: width 64 L with heads of 64 channels, tokens in proportion to the parameters, batch size and
learning rates from the FLOP budget. Values given by the user replace derived ones, and the values derived from them follow.

    n_embd = 64 n_layer            GPT-2's aspect ratio (12 layers, 768 channels); the loss depends little on it (Kaplan et
                                   al. 2020, arXiv:2001.08361, section 3.1)
    D = 20 N                       tokens per parameter: Hoffmann et al. 2022 (arXiv:2203.15556), tables 3 and A3
    batch = 0.2920 C^0.3271        tokens per step, and
    lr = 0.3118 C^-0.1250          with C = 6 N D FLOPs: DeepSeek-AI 2024 (arXiv:2401.02954), equation 1, fitted for AdamW
    muon_lr = 0.02                 the same for any width, because of Muon's scaling (`optim/muon.py`)
    embed_lr = 10 lr               with Muon and an untied head: measured on small models (docs/optimizers.md)

N counts the parameters used in matmuls: blocks and head, not positions or embeddings that are only looked up.

Limits: the fits are based on budgets of 1e17 to 2e19 FLOPs on web text; elsewhere they are a starting point. The batch is
rounded to the nearest power of two sequences, so that it divides among processes. The size of the dataset is not considered; a
dataset that is too short is repeated.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from bardling.config import OptimConfig, RunConfig, TrainConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.config.checks import doublings
from bardling.config.recipes import changed_settings
from bardling.errors import UserError
from bardling.planning.costs import matmul_parameters

HEAD_DIM = 64
"""Channels per head, and width per layer of depth."""

TOKENS_PER_PARAMETER = 20.0
"""Training tokens per parameter, near the compute-optimal ratio of Chinchilla's three fits."""

MAX_DEPTH = 200  # 64 * 200 = 12,800 channels is the size of GPT-3, beyond which these fits mean little


@dataclass(frozen=True)
class Derived:
    """A derived value and its reason."""

    value: int | float
    why: str


def derive(config: RunConfig, given: AbstractSet[str]) -> dict[str, Derived]:
    """Derive the settings of a compute-optimal run of `config.model.depth` layers, by dotted name.

    Args:
        given: dotted names of the settings that keep their values. They are not derived, but the values that depend on them
            are.

    Raises:
        UserError: the depth or a given width is invalid.
    """
    model = config.model
    values: dict[str, Derived] = {}
    if not 1 <= model.depth <= MAX_DEPTH:
        raise UserError(f"model.depth = {model.depth}: must be between 1 and {MAX_DEPTH} layers")

    def choose(key: str, value: float, why: str) -> Any:
        """The given value of `key`, or else `value`, which is recorded as derived."""
        if key in given:
            return attrgetter(key)(config)
        values[key] = Derived(value, why)
        return value

    n_layer = choose("model.n_layer", model.depth, "the depth")
    n_embd = choose("model.n_embd", HEAD_DIM * n_layer, f"{HEAD_DIM} channels per layer")
    max_heads = max(n_embd // (model.head_dim or HEAD_DIM), 1)
    heads = max(count for count in range(1, max_heads + 1) if n_embd % count == 0)
    n_head = choose("model.n_head", heads, f"heads of {n_embd // heads} channels")
    vocab_size = model.vocab_size or expected_vocab_size(config.data.tokenizer)
    shape = dataclasses.replace(model, depth=0, n_layer=n_layer, n_embd=n_embd, n_head=n_head, vocab_size=vocab_size)
    n = matmul_parameters(shape)
    d = TOKENS_PER_PARAMETER * n
    c = 6 * n * d
    budget = f"{n / 1e6:,.1f}M parameters and {c:.1e} FLOPs"
    tokens = 0.2920 * c**0.3271
    sequences = 1 << max(round(math.log2(tokens / model.block_size)), 0)
    sequences = choose("train.batch_size", sequences, f"about {tokens:,.0f} tokens, for {budget}")
    steps = choose(
        "train.steps",
        math.ceil(d / (sequences * _mean_batch(config.train, sequences) * model.block_size)),
        f"{TOKENS_PER_PARAMETER:g} tokens per parameter for {n / 1e6:,.1f}M parameters: {d / 1e6:,.0f}M",
    )
    choose("optim.warmup_steps", min(max(steps // 50, 10), (steps - 1) // 2), "steps / 50")
    lr = choose("optim.lr", _rounded(0.3118 * c**-0.1250), f"AdamW, for {budget}")
    if config.optim.name == "muon":
        choose("optim.muon_lr", OptimConfig.muon_lr, "the same for any width")
        if not shape.architecture.tied:  # a tied embedding does not benefit from a higher rate, and tolerates less
            choose("optim.embed_lr", _rounded(10 * lr), "10 times optim.lr")
    return values


def apply_depth(
    config: RunConfig,
    given: AbstractSet[str] | None = None,
    record: Callable[[str, object, str], None] = lambda key, value, why: None,
) -> RunConfig:
    """`config` with the values derived from `model.depth` filled in and `model.depth` reset to 0.

    Args:
        given: dotted names of the settings to keep, such as "model.n_embd"; None for those that differ from the default.
        record: called with each derived setting, its value and the reason.

    Raises:
        UserError: the derived values conflict with the given ones.
    """
    if not config.model.depth:
        return config
    sections: dict[str, dict[str, Any]] = {"model": {"depth": 0}, "optim": {}, "train": {}}
    for key, derived in derive(config, changed_settings(RunConfig(), config).keys() if given is None else given).items():
        section, name = key.split(".")
        sections[section][name] = derived.value
        record(key, derived.value, derived.why)
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def expected_vocab_size(tokenizer: str) -> int:
    """Vocabulary size of a tokenizer before it is built: exact for 'byte', 'bpe:SIZE' and 'gpt2'; an estimate for others."""
    if tokenizer == "byte":
        return 257  # 256 byte values and an end-of-text token
    if tokenizer == "char":
        return 128  # plain text has about a hundred different characters
    kind, _, size = tokenizer.partition(":")
    return int(size) if kind == "bpe" and size.isdecimal() and int(size) > 0 else GPT2_VOCAB_SIZE


def _mean_batch(train: TrainConfig, sequences: int) -> float:
    """Mean batch size as a fraction of the full one: n stages of equal length have 2^-n to 2^-1 of it, the rest all of it."""
    times = doublings(train.batch_start, sequences, "train.batch_start", "train.batch_size")
    return 1.0 if not times else 1.0 - train.ramp + train.ramp / times * (1.0 - 0.5**times)


def _rounded(value: float) -> float:
    """`value` with two significant digits: the fits are no more accurate, and people read these numbers."""
    return float(f"{value:.1e}")
