"""A small copy of a recipe, of the same kind, which trains in seconds: a few steps, a small batch and, if necessary, a shorter
context, a smaller model and other text.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch

from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MonitorConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
)
from bardling.data.text.named_datasets import is_source_name
from bardling.data.tokens.tokenizer import is_tokenizer_path
from bardling.distributed.device import DTYPES, Precision, matmul_flops
from bardling.planning.costs import flops_per_token

STEPS, BATCH = 6, 4
_ALL_STEPS = 9 * STEPS  # of all runs together, including the overhead of two processes and set-up
_SMALL_FILE = 50 << 20  # bytes of text that can be prepared in seconds


def shrink(
    config: RunConfig, folder: Path, device: torch.device, precision: Precision, seconds: float
) -> tuple[RunConfig, list[str]]:
    """A copy of `config` that trains in seconds, and what was changed in its model and data."""
    data, notes = _small_data(config.data, folder)
    # Most of the time goes into starting processes, and small models are far from the peak.
    budget = seconds / 6 * matmul_flops(device, DTYPES[precision.name]) * 0.2  # FLOPs
    model, changes = _small_model(config.model, budget)
    context_grows = config.train.context_doublings(config.model.block_size) > 0 and model.block_size % 2 == 0
    small = dataclasses.replace(
        config,
        device=str(device),
        precision=precision.name,
        compile="off",
        deterministic=True,
        model=model,
        data=data,
        optim=dataclasses.replace(config.optim, warmup_steps=2, decay_steps=None),
        train=dataclasses.replace(
            config.train,
            steps=STEPS,
            batch_size=BATCH,
            micro_batch=2,
            log_every=1,
            deadline=None,
            rank_timeout=30.0,
            # One doubling, before the step at which the resumed run starts.
            batch_start=BATCH // 2 if config.train.batch_doublings else None,
            context_start=model.block_size // 2 if context_grows else None,
            ramp=0.75,
        ),
        eval=EvalConfig(every=STEPS // 2, windows=4),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=STEPS // 2, keep_last=3),
        monitor=MonitorConfig(),
        parallel=ParallelConfig(),
    )
    return small, notes + changes


def _small_data(data: DataConfig, folder: Path) -> tuple[DataConfig, list[str]]:
    """Data that can be prepared in seconds: the recipe's own, if possible."""
    path = Path(data.source)
    named = is_source_name(data.source)
    prepared = not named and bool(data.source) and (path / "manifest.json").is_file()
    if data.val_source or (not prepared and not (not named and path.is_file() and path.stat().st_size <= _SMALL_FILE)):
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in _documents()), encoding="utf-8")
        alone: dict[str, Any] = {"sources": (), "stages": (), "val_source": "", "encoding": ""}
        data = dataclasses.replace(data, source=str(text), tokenizer="byte", cache=str(folder / "cache"), **alone)
        return data, ["synthetic text, because the recipe's data would take long to prepare"]
    data = dataclasses.replace(data, cache=data.cache or str(folder / "cache"))
    if prepared or data.tokenizer in ("byte", "char") or is_tokenizer_path(data.tokenizer):
        return data, []
    return dataclasses.replace(data, tokenizer="byte"), [f"tokenizer 'byte' instead of {data.tokenizer!r}"]


def _small_model(model: ModelConfig, budget: float) -> tuple[ModelConfig, list[str]]:
    """A model of the same kind, with new weights, that all runs can train within `budget` FLOPs."""
    notes = [f"new weights instead of {model.init}"] if model.init else []
    model = dataclasses.replace(model, init="")
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    for smaller in (_shorter, shallower, _narrower, _shorter, _narrower):
        sized = dataclasses.replace(model, vocab_size=model.vocab_size or 256)
        if flops_per_token(sized, model.block_size) * BATCH * model.block_size * _ALL_STEPS > budget:
            before, model = model, smaller(model)
            changes = [(name, getattr(before, name), getattr(model, name)) for name in names]
            notes += [f"model.{name} {old} -> {new}" for name, old, new in changes if old != new]
    return model, notes


def _shorter(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, block_size=max(32, min(model.block_size, 256) // 2))


def shallower(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, n_layer=min(model.n_layer, 2), value_embeddings=min(model.value_embeddings, 1))


def _narrower(model: ModelConfig) -> ModelConfig:
    """Fewer heads of the same width, with as many key-value heads as divide them; a vocabulary of bytes."""
    heads, width = min(model.n_head, 4) // 2 or 1, model.n_embd // model.n_head
    kv = None if model.n_kv_head is None else max(n for n in range(1, heads + 1) if heads % n == 0 and n <= model.n_kv_head)
    hidden = None if model.mlp_hidden is None else max(8, model.mlp_hidden * heads // model.n_head)
    return dataclasses.replace(model, n_head=heads, n_embd=heads * width, n_kv_head=kv, mlp_hidden=hidden, vocab_size=0)


def _documents() -> list[str]:
    """About 200 kB of text with some structure in 225 documents, always the same."""
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(chance.choices(words, k=chance.randint(4, 12))).capitalize() + ".\n" for _ in range(4500)]
    return ["".join(lines[first : first + 20]) for first in range(0, len(lines), 20)]
