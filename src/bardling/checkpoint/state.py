"""What is in one checkpoint folder, and how it is written and read.

    config.json, model.safetensors     Hugging Face's layout of GPT-2, Llama or Qwen3: `transformers` opens the folder as it is
                                       (of another model: model_type "bardling" and our own names; only bardling opens it)
    tokenizer.json, tokenizer_config.json
    optimizer.safetensors              the optimizer's tensors, by parameter name
    rng.safetensors                    the random number generators
    training.json                      step, samples, best loss, scaler, the optimizer's other facts
    run_config.json                    the resolved configuration

The model's weights are kept as float32, without the rows that pad the vocabulary: these are always zero. Everything read is
taken for hostile: JSON is capped in size and checked value by value, tensors are compared with the shapes that the
configuration asks for, and nothing is unpickled.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bardling.checkpoint.rng import restore_rng, rng_state
from bardling.checkpoint.tensorfile import read_tensors, write_tensors
from bardling.config import ModelConfig
from bardling.data.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.interop.huggingface import from_hf_state, hf_config, hf_state, model_config_from_hf

__all__ = ["Checkpoint", "read_checkpoint", "read_model", "restore_rng", "rng_state", "write_checkpoint"]

FORMAT = 1
LARGEST_JSON = 16 << 20  # bytes; the largest of these files has a short line per parameter


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint; `optimizer_tensors` and `rng` are empty when they were not asked for."""

    model_config: ModelConfig
    model_state: dict[str, Tensor]  # as GPT.state_dict(): float32, padded
    optimizer_tensors: dict[str, Tensor]
    optimizer_meta: dict[str, Any]
    training: dict[str, Any]  # step, samples, best_val_loss, best_step, hooks_done, scaler, and what else was written
    rng: dict[str, Tensor]
    run_config: dict[str, Any]


def write_model(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Write the files that `transformers` opens into an existing, empty folder: configuration, weights and tokenizer.

    Args:
        state: as `GPT.state_dict()`.
        tokenizer: None for data that came as tokens without one.

    Raises:
        OSError: a file cannot be written.
    """
    eot_id = None if tokenizer is None else tokenizer.eot_id
    _write_json(folder / "config.json", hf_config(config, eot_id=eot_id))
    weights = hf_state(dict(state), config)
    write_tensors(folder / "model.safetensors", {name: tensor.float() for name, tensor in weights.items()})
    if tokenizer is not None:
        tokenizer.save(folder)


def write_checkpoint(
    folder: Path,
    *,
    model_state: Mapping[str, Tensor],
    model_config: ModelConfig,
    optimizer_tensors: Mapping[str, Tensor],
    optimizer_meta: Mapping[str, Any],
    training: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    run_config: Mapping[str, Any],
) -> None:
    """Write the files of a checkpoint into an existing, empty folder. `CheckpointStore.save` makes them appear at once.

    Args:
        model_state, tokenizer: as `write_model` takes them.
        training: JSON-able, with `step`, `samples` and `best_val_loss` (inf: never validated).

    Raises:
        OSError: a file cannot be written.
    """
    write_model(folder, model_config, model_state, tokenizer)
    write_tensors(folder / "optimizer.safetensors", optimizer_tensors)
    write_tensors(folder / "rng.safetensors", rng)
    best = training["best_val_loss"]
    facts = {**training, "best_val_loss": best if math.isfinite(best) else None}  # JSON knows no infinity
    _write_json(folder / "training.json", {"format": FORMAT, **facts, "optimizer": dict(optimizer_meta)})
    _write_json(folder / "run_config.json", dict(run_config))


def read_checkpoint(folder: Path, *, optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        optimizer: also read what only resuming needs: the optimizer's tensors and the random number generators.

    Raises:
        UserError: a file is missing, damaged, or of another architecture or format.
    """
    model_config, model_state = read_model(folder)
    training = read_training(folder / "training.json")
    meta = training.pop("optimizer", {})
    if not isinstance(meta, dict):
        raise UserError(f"{folder / 'training.json'}: optimizer = {meta!r} must be an object")
    return Checkpoint(
        model_config=model_config,
        model_state=model_state,
        optimizer_tensors=read_tensors(folder / "optimizer.safetensors") if optimizer else {},
        optimizer_meta=meta,
        training=training,
        rng=read_tensors(folder / "rng.safetensors") if optimizer else {},
        run_config=_read_json(folder / "run_config.json"),
    )


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read only the model: its configuration and the weights as `GPT.state_dict()` has them.

    Raises:
        UserError: as `read_checkpoint`.
    """
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    config = model_config_from_hf(_read_json(config_file), str(config_file))
    state = from_hf_state(read_tensors(weights_file), config, str(weights_file))
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{weights_file}: {name} is {tensor.dtype}, but weights must be floating-point numbers")
    return config, {name: tensor.float() for name, tensor in state.items()}


def read_training(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint's `training.json`, checked: step, samples, best_val_loss (inf: none yet), best_step, ...

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    data = _read_json(path)
    if data.pop("format", None) != FORMAT:
        raise UserError(f"{path}: has an unknown format; this version reads format {FORMAT}")
    for key, least in (("step", 0), ("samples", 0), ("best_step", -1)):
        value = data.setdefault("best_step", -1) if key == "best_step" else data.get(key)
        if type(value) is not int or value < least:
            raise UserError(f"{path}: {key} = {value!r} must be a whole number, at least {least}")
    best = data.get("best_val_loss")
    if best is not None and (type(best) not in (int, float) or not abs(best) < 1e300):
        raise UserError(f"{path}: best_val_loss = {best!r} must be a number, or null before the first validation")
    data["best_val_loss"] = math.inf if best is None else float(best)
    done = data.setdefault("hooks_done", {})
    if not isinstance(done, dict) or not all(type(step) is int for step in done.values()):
        raise UserError(f"{path}: hooks_done = {done!r} must be an object of steps")
    scaler = data.setdefault("scaler", None)
    if scaler is not None and not (isinstance(scaler, dict) and all(type(v) in (int, float) for v in scaler.values())):
        raise UserError(f"{path}: scaler = {scaler!r} must be null or an object of numbers")
    return data


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise UserError(f"{path}: is missing")
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value
