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
from dataclasses import dataclass, field
from typing import Any

from bardling.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.config.checks import doublings
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


@dataclass
class _Values:
    """Values given by the user, and values derived for the others."""

    given: dict[str, Any]
    derived: dict[str, Derived] = field(default_factory=dict)

    def choose(self, key: str, value: float, why: str) -> Any:
        """The given value of `key`, or else `value`, which is recorded as derived."""
        if key in self.given:
            return self.given[key]
        self.derived[key] = Derived(value, why)
        return value


def derive(
    depth: int,
    vocab_size: int,
    *,
    model: ModelConfig | None = None,
    optim: OptimConfig | None = None,
    train: TrainConfig | None = None,
    tokens_per_parameter: float = TOKENS_PER_PARAMETER,
    given: dict[str, Any] | None = None,
) -> dict[str, Derived]:
    """Derive the settings of a compute-optimal run of a model with `depth` layers, by dotted name.

    Args:
        depth: layers.
        vocab_size: size of the tokenizer, or an estimate.
        model: other architecture options; None for GPT-2's.
        optim: selects the optimizer; None for AdamW.
        train: how the batch grows; None for a constant batch.
        tokens_per_parameter: training tokens per parameter.
        given: settings with fixed values, by dotted name. They are not derived, but the values that depend on them are.

    Raises:
        UserError: the depth or a given width is invalid.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise UserError(f"model.depth = {depth}: must be between 1 and {MAX_DEPTH} layers")
    model, optim, values = model or ModelConfig(), optim or OptimConfig(), _Values(given or {})
    n_layer = values.choose("model.n_layer", depth, "the depth")
    n_embd = values.choose("model.n_embd", HEAD_DIM * n_layer, f"{HEAD_DIM} channels per layer")
    max_heads = max(n_embd // (model.head_dim or HEAD_DIM), 1)
    heads = max(count for count in range(1, max_heads + 1) if n_embd % count == 0)
    n_head = values.choose("model.n_head", heads, f"heads of {n_embd // heads} channels")
    shape = dataclasses.replace(model, depth=0, n_layer=n_layer, n_embd=n_embd, n_head=n_head, vocab_size=vocab_size)
    _derive_training(values, shape, optim, train or TrainConfig(), tokens_per_parameter)
    return values.derived


def _derive_training(
    values: _Values, model: ModelConfig, optim: OptimConfig, train: TrainConfig, tokens_per_parameter: float
) -> None:
    """Derive batch size, steps and learning rates from the FLOPs of training `model`."""
    n = matmul_parameters(model)
    d = tokens_per_parameter * n
    c = 6 * n * d
    budget = f"{n / 1e6:,.1f}M parameters and {c:.1e} FLOPs"
    tokens = 0.2920 * c**0.3271
    sequences = 1 << max(round(math.log2(tokens / model.block_size)), 0)
    sequences = values.choose("train.batch_size", sequences, f"about {tokens:,.0f} tokens, for {budget}")
    steps = values.choose(
        "train.steps",
        math.ceil(d / (sequences * _mean_batch(train, sequences) * model.block_size)),
        f"{tokens_per_parameter:g} tokens per parameter for {n / 1e6:,.1f}M parameters: {d / 1e6:,.0f}M",
    )
    values.choose("optim.warmup_steps", min(max(steps // 50, 10), (steps - 1) // 2), "steps / 50")
    lr = values.choose("optim.lr", _rounded(0.3118 * c**-0.1250), f"AdamW, for {budget}")
    if optim.name == "muon":
        values.choose("optim.muon_lr", OptimConfig.muon_lr, "the same for any width")
        if not model.architecture.tied:  # a tied embedding does not benefit from a higher rate, and tolerates less
            values.choose("optim.embed_lr", _rounded(10 * lr), "10 times optim.lr")


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
    given = _non_default_settings(config) if given is None else given
    sections: dict[str, dict[str, Any]] = {"model": {"depth": 0}, "optim": {}, "train": {}}
    for key, derived in derived_values(config, given).items():
        section, name = key.split(".")
        sections[section][name] = derived.value
        record(key, derived.value, derived.why)
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def _non_default_settings(config: RunConfig) -> set[str]:
    sections = {name: (getattr(config, name), getattr(RunConfig(), name)) for name in ("model", "optim", "train")}
    return {
        f"{name}.{field.name}"
        for name, (section, default) in sections.items()
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != getattr(default, field.name)
    }


def derived_values(config: RunConfig, explicit: AbstractSet[str]) -> dict[str, Derived]:
    """The values that `apply_depth` fills in, with reasons; the arguments are the same."""
    given = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in explicit if key.count(".") == 1}
    size = config.model.vocab_size or expected_vocab_size(config.data.tokenizer)
    return derive(config.model.depth, size, model=config.model, optim=config.optim, train=config.train, given=given)


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
