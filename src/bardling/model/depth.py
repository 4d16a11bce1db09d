"""One dial: the number of layers sets every size of a run that trains its model compute-optimally.

From depth L and the vocabulary: width 64 L with heads of 64 channels; tokens in proportion to the parameters; batch and
learning rates from the budget of arithmetic. A value that the user gives takes the place of the derived one, and what is
derived from it follows.

    n_embd = 64 n_layer            GPT-2's aspect ratio (12 layers, 768 channels); the loss depends little on it (Kaplan et
                                   al. 2020, arXiv:2001.08361, section 3.1)
    D = 20 N                       tokens per parameter: Hoffmann et al. 2022 (arXiv:2203.15556), tables 3 and A3
    batch = 0.2920 C^0.3271        tokens a step, and
    lr = 0.3118 C^-0.1250          with C = 6 N D FLOPs: DeepSeek-AI 2024 (arXiv:2401.02954), equation 1, fitted for AdamW
    muon_lr = 0.02                 the same at any width, by Muon's scaling (`optim/muon.py`)
    embed_lr = 10 lr               with Muon, for a token embedding that is not the head too: measured on small models
                                   (docs/optimizers.md)

N counts what a token is multiplied with: blocks and head, not positions nor embeddings that are only looked up.

Limits: the fits come from budgets of 1e17 to 2e19 FLOPs on web text; elsewhere they are a start. A batch is rounded to the
nearest power of two of sequences, so that it divides among processes. Data that is too short repeats: the dial does not know.
"""

import dataclasses
import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from bardling.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, doublings
from bardling.errors import UserError
from bardling.model.arithmetic import multiplied_parameters

HEAD_DIM = 64
"""Channels of a head, and width that each layer of depth adds."""

TOKENS_PER_PARAMETER = 20.0
"""Training tokens for each parameter, near which Chinchilla's three fits place the best use of a budget."""

_MOST = 200  # layers; 64 * 200 = 12,800 channels is GPT-3's size, beyond which the arithmetic below means little


@dataclass(frozen=True)
class Derived:
    """One value that the dial sets, and what it follows from."""

    value: int | float
    why: str


def dial(
    depth: int,
    vocab_size: int,
    *,
    model: ModelConfig | None = None,
    optim: OptimConfig | None = None,
    train: TrainConfig | None = None,
    tokens_per_parameter: float = TOKENS_PER_PARAMETER,
    given: dict[str, Any] | None = None,
) -> dict[str, Derived]:
    """Every value of a compute-optimal run of a model of `depth` layers, by its dotted name.

    Args:
        depth: layers.
        vocab_size: of the tokenizer, as near as it is known.
        model: the other options of the architecture; GPT-2's when absent.
        optim: which optimizer; AdamW when absent.
        train: how the batch grows; it is whole from the start when absent.
        tokens_per_parameter: the horizon.
        given: values that are set already, by dotted name. They are not derived, but what depends on them follows.

    Raises:
        UserError: the depth, or the width that is given, allows no model.
    """
    if not 1 <= depth <= _MOST:
        raise UserError(f"model.depth = {depth}: must be from 1 to {_MOST} layers")
    model, optim, given = model or ModelConfig(), optim or OptimConfig(), given or {}
    found: dict[str, Derived] = {}

    def settle(key: str, value: float, why: str) -> Any:
        if key in given:
            return given[key]
        found[key] = Derived(value, why)
        return value

    n_layer = settle("model.n_layer", depth, "the depth")
    n_embd = settle("model.n_embd", HEAD_DIM * n_layer, f"{HEAD_DIM} channels for each layer")
    wide = model.head_dim or HEAD_DIM
    heads = max(count for count in range(1, max(n_embd // wide, 1) + 1) if n_embd % count == 0)
    n_head = settle("model.n_head", heads, f"heads of {n_embd // heads} channels")
    shape = dataclasses.replace(model, depth=0, n_layer=n_layer, n_embd=n_embd, n_head=n_head, vocab_size=vocab_size)

    n = multiplied_parameters(shape)
    d = tokens_per_parameter * n
    c = 6 * n * d
    about = f"{n / 1e6:,.1f}M parameters and {c:.1e} FLOPs"
    tokens = 0.2920 * c**0.3271
    sequences = settle(
        "train.batch_size",
        1 << max(round(math.log2(tokens / shape.block_size)), 0),
        f"about {tokens:,.0f} tokens, for {about}",
    )
    steps = settle(
        "train.steps",
        math.ceil(d / (sequences * _mean_batch(train or TrainConfig(), sequences) * shape.block_size)),
        f"{tokens_per_parameter:g} tokens for each of {n / 1e6:,.1f}M parameters: {d / 1e6:,.0f}M",
    )
    settle("optim.warmup_steps", min(max(steps // 50, 10), (steps - 1) // 2), "a fiftieth of the steps")
    lr = settle("optim.lr", _rounded(0.3118 * c**-0.1250), f"AdamW's, for {about}")
    if optim.name == "muon":
        settle("optim.muon_lr", OptimConfig.muon_lr, "the same at any width")
        if not shape.architecture.tied:  # as the head too, it gains nothing from a higher rate and bears less of it
            settle("optim.embed_lr", _rounded(10 * lr), "ten times optim.lr")
    return found


def apply_depth(config: RunConfig, explicit: AbstractSet[str], vocab_size: int | None = None) -> RunConfig:
    """`config` with every value that its `model.depth` derives, and `model.depth` 0 again: what is left needs no dial.

    Args:
        explicit: dotted names of the values that the user gave ("model.n_embd"), which stay.
        vocab_size: the tokenizer's, where it is known; else what `data.tokenizer` promises.

    Raises:
        UserError: the derived values do not fit what is given.
    """
    if not config.model.depth:
        return config
    sections: dict[str, dict[str, Any]] = {"model": {"depth": 0}, "optim": {}, "train": {}}
    for key, derived in derived_values(config, explicit, vocab_size).items():
        section, name = key.split(".")
        sections[section][name] = derived.value
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def without_dial(config: RunConfig) -> RunConfig:
    """`apply_depth` for a configuration of which nobody knows what was given: what is not the default was."""
    sections = {name: (getattr(config, name), getattr(RunConfig(), name)) for name in ("model", "optim", "train")}
    given = {
        f"{name}.{field.name}"
        for name, (section, default) in sections.items()
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != getattr(default, field.name)
    }
    return apply_depth(config, given)


def derived_values(config: RunConfig, explicit: AbstractSet[str], vocab_size: int | None = None) -> dict[str, Derived]:
    """What `apply_depth` sets and why, to be shown; the arguments are its."""
    given = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in explicit if key.count(".") == 1}
    known = vocab_size or config.model.vocab_size or expected_vocabulary(config.data.tokenizer)
    return dial(config.model.depth, known, model=config.model, optim=config.optim, train=config.train, given=given)


def expected_vocabulary(tokenizer: str) -> int:
    """Entries that a tokenizer will have, before it is made: exact for 'byte' and 'bpe:SIZE', GPT-2's for files."""
    if tokenizer == "byte":
        return 257  # the bytes and an end-of-text token
    if tokenizer == "char":
        return 128  # plain text uses about a hundred characters
    kind, _, size = tokenizer.partition(":")
    return int(size) if kind == "bpe" and size.isdecimal() and int(size) > 0 else 50257


def _mean_batch(train: TrainConfig, sequences: int) -> float:
    """Mean batch of a run as a part of the whole one: n stages of equal length have 2^-n to 2^-1 of it, the rest has all."""
    times = doublings(train.batch_start, sequences, "train.batch_start", "train.batch_size")
    return 1.0 if not times else 1.0 - train.ramp + train.ramp / times * (1.0 - 0.5**times)


def _rounded(value: float) -> float:
    """Two significant digits: no fit is better, and people read these."""
    return float(f"{value:.1e}")
