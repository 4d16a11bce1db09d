"""What a run that has started may still change, and what it keeps.

A resumed run takes its own configuration with the user's changes on top. Weights and the order of the data bind some settings;
the others take effect, and the run says which they are.
"""

import dataclasses
from pathlib import Path
from typing import Any

from bardling.config import RunConfig, TrainConfig
from bardling.configfile import config_to_dict
from bardling.errors import UserError
from bardling.optim.build import settle_muon_precision


def settle(config: RunConfig, before: RunConfig) -> RunConfig:
    """`config` with what it leaves open (vocabulary, precision, compilation) as it was decided `before`."""
    ramp = config.train.ramp
    if ramp == before.train.ramp and (config.train.batch_start or config.train.context_start):
        # Other steps leave the stages of batch and context where they were, unless the run ends before them.
        ramp = min(1.0, ramp * before.train.steps / config.train.steps)
    config = absolute(config)
    return dataclasses.replace(
        config,
        precision=before.precision if config.precision == "auto" else config.precision,
        compile=before.compile if config.compile == "auto" else config.compile,
        model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or before.model.vocab_size).resolved(),
        optim=settle_muon_precision(config.optim, before.precision),
        train=dataclasses.replace(
            config.train,
            ramp=ramp,
            micro_batch=before.train.micro_batch if config.train.micro_batch == "auto" else config.train.micro_batch,
        ),
    )


def absolute(config: RunConfig) -> RunConfig:
    """`config` with its paths made absolute, so that the run can be resumed from any folder."""

    def settled(spec: str) -> str:
        path = Path(spec.split(":", 1)[0])
        is_path = bool(spec) and (path.exists() or any(sign in spec for sign in "*?["))
        return str(Path.cwd() / spec) if is_path and not path.is_absolute() else spec

    data, model = config.data, config.model
    cache = data.cache and str(Path(data.cache).expanduser().absolute())
    data = dataclasses.replace(data, source=settled(data.source), tokenizer=settled(data.tokenizer), cache=cache)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(model, init=settled(model.init)))


# A model that has been trained, and its optimizer, are bound to these; what else changes on resume takes effect, and is said.
_FIXED = ("seed", "data.source", "data.tokenizer", "data.val_fraction", "optim.name")


def check_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Describe what changed between two configurations of one run ("train.steps: 100 -> 200").

    Raises:
        UserError: a change that the trained weights or the exact data order cannot follow.
    """
    old, new = _flat(config_to_dict(before)), _flat(config_to_dict(after))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key in _FIXED or (key.startswith("model.") and key != "model.dropout"):
            raise UserError(
                f"{key} = {new.get(key)!r}: a run that has started keeps {old.get(key)!r}; start a new run for another"
            )
        changes.append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return changes


def check_steps(config: TrainConfig, done: int, where: str | Path) -> None:
    """Refuse to end a run before where it is: its learning rate and its stages would follow another plan than the one it had.

    Args:
        done: steps that the run, or the checkpoint that it goes on from, has done.
        where: the one or the other.

    Raises:
        UserError: `config` asks for fewer steps. (With a deadline it asks for none: they are planned while the run goes on.)
    """
    if config.deadline is None and config.steps < done:
        raise UserError(f"train.steps = {config.steps}: {where} has done {done} steps already; set it to at least that")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
