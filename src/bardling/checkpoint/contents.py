"""What one checkpoint folder contains, and how it is written and read.

    config.json, model.safetensors     the Hugging Face layout of GPT-2, Llama or Qwen3, which `transformers` opens as it is
                                       (other models: model_type "bardling" and our own names, which only bardling opens)
    tokenizer.json, tokenizer_config.json, and what else describes the model's text (`data/tokens/text_interface.py`)
    adapter_config.json, adapter_model.safetensors   instead of these two, for a run with LoRA: in PEFT's format
    optimizer.safetensors              the optimizer's tensors, by parameter name
    rng.safetensors                    the random number generators
    training.json                      step, samples, best loss, gradient scaler, the optimizer's other values
    run_config.json                    the resolved configuration

Processes that hold shards write `model-00001-of-00004.safetensors` and so on, with the index that `transformers` expects, and
`optimizer-00001-of-00004.safetensors`: each has some of the tensors, whole, so any number of processes can read them.

The weights are float32, without the rows that pad the vocabulary, which are always zero. Everything read is untrusted: JSON is
limited in size and checked, tensors must have the shapes that the configuration requires, and nothing is unpickled.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardling.config import ModelConfig, RunConfig, TuneConfig
from bardling.config.recipes import config_from_dict
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.reading import read_json_object
from bardling.interop.huggingface import from_hf_state, hf_config, hf_state, model_config_from_hf, refuse_nonfinite
from bardling.interop.peft import (
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_state,
    from_adapter_state,
    is_adapter,
    write_adapter,
)
from bardling.interop.tensor_file import Computed, LazyTensors, read_tensors, write_tensors
from bardling.interop.weight_index import INDEX, indexed_files
from bardling.planning.parameter_shapes import parameter_shapes

RUN_CONFIG = "run_config.json"
_OPTIMIZER_PART = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint that change during a run, and the model's configuration."""

    model_config: ModelConfig
    model_state: Mapping[str, Tensor]  # GPT.state_dict(): float32, padded
    optimizer_tensors: Mapping[str, Tensor]  # empty unless requested
    optimizer_meta: Mapping[str, Any]
    training: Mapping[str, Any]  # JSON values: step, samples, best_val_loss (inf: never validated), best_step, hooks_done, ...
    rng: dict[str, Tensor] = field(default_factory=dict)  # empty unless requested
    tune: TuneConfig | None = None  # of a run with LoRA: `model_state` then has the adapters only
    owners: Mapping[str, int] = field(default_factory=dict)  # by which process each parameter is written, if by several
    writers: int = 1  # number of these processes


def write_model(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype = torch.float32,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Write the files that `transformers` opens (configuration, weights, tokenizer if there is one) into an empty folder.

    `dtype`: of the weights; a `UserError` if one exceeds its range. `ids`: of special tokens (None: those of the tokenizer).
    """
    write_description(folder, config, tokenizer, dtype=dtype, ids=ids)
    weights = {name: tensor.to(dtype) for name, tensor in hf_state(state, config).items()}
    if dtype != torch.float32:
        refuse_nonfinite(weights, f"--dtype {str(dtype).removeprefix('torch.')}")
    write_tensors(folder / "model.safetensors", weights)


def write_description(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype = torch.float32,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Write what `write_model` does without the weights."""
    values = {**hf_config(config), "dtype": str(dtype).removeprefix("torch.")}
    if ids is None and tokenizer is not None:
        ids = tokenizer.interface.model_ids(config.vocab_size)
    if ids is not None and "bos_token_id" in values:
        values |= ids
    _write_json(folder / "config.json", values)
    if tokenizer is not None:
        tokenizer.save(folder)
        _state_length(folder / "tokenizer_config.json", config)


def _state_length(path: Path, config: ModelConfig) -> None:
    """State the model's context in a `tokenizer_config.json`, so that truncation works, unless a valid length is stated."""
    values = read_json_object(path)
    stated = values.get("model_max_length")
    # transformers writes 1e30 for "unknown"; learned positions end at the context, rotary ones do not.
    longest = config.context if config.architecture.positions == "learned" else 10**9
    if not isinstance(stated, int | float) or not 0 < stated <= longest:
        _write_json(path, {**values, "model_max_length": config.context})


def write_checkpoint(
    folder: Path, content: Checkpoint, tokenizer: Tokenizer | None, run_config: Mapping[str, Any], base: str = ""
) -> None:
    """Write the files of a checkpoint into an existing, empty folder, which `CheckpointStore.save` then makes visible.

    `base`: of a run with LoRA, the folder of the model that its adapters change.
    """
    if content.writers > 1:
        write_description(folder, content.model_config, tokenizer)
        write_part(folder, content, 0)
        _write_json(folder / INDEX, _index(content))
    elif content.tune is None:
        write_model(folder, content.model_config, content.model_state, tokenizer)
    else:
        config, tune = content.model_config, content.tune
        write_adapter(folder, adapter_config(config, tune, base), adapter_state(content.model_state, config, tune))
        if tokenizer is not None:
            tokenizer.save(folder)
    if content.writers == 1:
        write_tensors(folder / "optimizer.safetensors", content.optimizer_tensors)
    write_tensors(folder / "rng.safetensors", content.rng)
    best = content.training["best_val_loss"]
    values = {**content.training, "best_val_loss": best if math.isfinite(best) else None}  # JSON has no infinity
    _write_json(folder / "training.json", {"format": _FORMAT, **values, "optimizer": content.optimizer_meta})
    _write_json(folder / RUN_CONFIG, run_config)


def write_part(folder: Path, content: Checkpoint, writer: int) -> None:
    """Write the tensors that one of several processes has, and make them durable."""
    tensors = {"model": hf_state(content.model_state, content.model_config), "optimizer": content.optimizer_tensors}
    for kind, found in tensors.items():
        path = folder / _part_file(kind, writer, content.writers)
        write_tensors(path, found)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the process that completes the checkpoint may be on another machine


def _part_file(kind: str, writer: int, writers: int) -> str:
    return f"{kind}-{writer + 1:05d}-of-{writers:05d}.safetensors"


def _index(content: Checkpoint) -> dict[str, Any]:
    """The index of weights in several files, as `transformers` reads it."""
    config, files, total = content.model_config, {}, 0
    for name, shape in parameter_shapes(config).items():
        empty = {name: torch.empty(shape, device="meta")}
        for written, tensor in hf_state(empty, config).items():
            files[written] = _part_file("model", content.owners[name], content.writers)
            total += tensor.nbytes
    return {"metadata": {"total_size": total}, "weight_map": files}


def read_checkpoint(folder: Path, *, optimizer: bool = True, lazy: bool = False) -> Checkpoint:
    """Read and check a checkpoint; with `optimizer`, also what only resuming needs: optimizer tensors and random numbers. With
    `lazy`, tensors are read when they are asked for, one at a time."""
    tune = None
    if is_adapter(folder):
        path = folder / RUN_CONFIG
        run = config_from_dict(RunConfig, read_json_object(path), str(path))
        model_config, tune, where = run.model, run.tune, folder / ADAPTER_WEIGHTS
        model_state: Mapping[str, Tensor] = from_adapter_state(read_tensors(where), model_config, tune, str(where))
    else:
        model_config, model_state = read_model(folder, lazy=lazy)
    training = read_training(folder / "training.json")
    meta = training.pop("optimizer", {})
    if not isinstance(meta, dict):
        raise UserError(f"{folder / 'training.json'}: optimizer = {meta!r} must be an object")
    if not optimizer:
        return Checkpoint(model_config, model_state, {}, meta, training, {}, tune)
    parts = sorted(path for path in folder.iterdir() if _OPTIMIZER_PART.fullmatch(path.name))
    tensors = LazyTensors(*(parts or [folder / "optimizer.safetensors"]))
    rng = read_tensors(folder / "rng.safetensors")
    return Checkpoint(model_config, model_state, tensors if lazy else dict(tensors), meta, training, rng, tune)


def read_model(folder: Path, *, lazy: bool = False) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Read only the model: its configuration and `GPT.state_dict()`; `lazy` as for `read_checkpoint`."""
    config_file = folder / "config.json"
    values = read_json_object(config_file)
    config = model_config_from_hf(values, str(config_file))
    files = [*indexed_files(folder / INDEX)] if (folder / INDEX).is_file() else [folder / "model.safetensors"]
    where = str(files[0] if len(files) == 1 else folder)
    state = from_hf_state(LazyTensors(*files), config, where, values["model_type"])
    weights = Computed({name: partial(_weight, state, name, where) for name in state})
    return config, weights if lazy else dict(weights)


def _weight(state: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if not (tensor := state[name]).is_floating_point():
        raise UserError(f"{where}: {name} is {tensor.dtype}, but weights must have a floating-point dtype")
    return tensor.float()


def read_training(path: Path) -> dict[str, Any]:
    """Read and check `training.json`: step, samples, best_val_loss (inf: none yet), best_step, ..."""
    data = read_json_object(path)
    if data.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: unknown format; this version reads format {_FORMAT}")
    data.setdefault("best_step", -1)
    for key, minimum in (("step", 0), ("samples", 0), ("best_step", -1)):
        value = data.get(key)
        if type(value) is not int or value < minimum:
            raise UserError(f"{path}: {key} = {value!r} must be an integer of at least {minimum}")
    best = data.get("best_val_loss")
    if best is not None and (type(best) not in (int, float) or not abs(best) < 1e300):
        raise UserError(f"{path}: best_val_loss = {best!r} must be a number, or null before the first validation")
    data["best_val_loss"] = math.inf if best is None else float(best)
    done = data.setdefault("hooks_done", {})
    if not isinstance(done, dict) or not all(type(step) is int for step in done.values()):
        raise UserError(f"{path}: hooks_done = {done!r} must map names to steps")
    scaler = data.setdefault("scaler", None)
    if scaler is not None and not (isinstance(scaler, dict) and all(type(v) in (int, float) for v in scaler.values())):
        raise UserError(f"{path}: scaler = {scaler!r} must be null or map names to numbers")
    return data


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
