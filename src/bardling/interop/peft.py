"""PEFT's format of LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

Written so that PEFT opens the folder on the model that `base_model_name_or_path` names. GPT-2 has one matrix for queries, keys
and values in `transformers`, and here an adapter for each: their product is that of one adapter of the sum of the ranks whose B
is zero outside the diagonal blocks, and whose alpha grows with the rank.

Read from anywhere, to be merged into the base model: W + scale * B A. Files are untrusted. A setting that changes the result is
refused by name unless it is implemented here (rsLoRA, other ranks and alphas for some layers, whole layers saved beside the
adapters, embeddings of single tokens).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bardling.config import ModelConfig, TuneConfig
from bardling.errors import UserError
from bardling.files.reading import read_json_object
from bardling.interop.families import Part, check_fixed, layout_of, positive_int, positive_number, shown, tensor_parts
from bardling.interop.tensor_file import read_tensors, write_tensors
from bardling.planning.parameter_shapes import EMBEDDING, adapted_parts, adapter_shapes, matrix_rows

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_FIXED: dict[str, tuple[object, ...]] = {  # settings not implemented here, and their only supported values
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Others change the weights of the base model first.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_HARMLESS = {  # settings that do not change what a trained adapter computes, or that are implemented here
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "r", "lora_alpha", "revision", "runtime_config", "target_modules", "task_type"),
    *("alpha_pattern", "rank_pattern", "trainable_token_indices", "use_rslora"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of initial values that are refused, or finished
}


class _Block(NamedTuple):
    """One of our adapters within a matrix of the other format."""

    name: str  # of its parameters: `{name % 'A'}` and `{name % 'B'}`
    rows: slice  # of that matrix


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as it is in its files."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def stated_base(folder: Path) -> str:
    """The model that the configuration of an adapter names: a name on the hub, or a folder."""
    base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        fault = f"base_model_name_or_path = {shown(base)}: must name the model that the adapter was trained on"
        raise UserError(f"{folder / ADAPTER_CONFIG}: {fault}")
    return base


def read_adapter(folder: Path) -> AdapterFolder:
    """Read and check the files of an adapter, whose base model is not known yet."""
    path = folder / ADAPTER_CONFIG
    config = read_json_object(path)
    check_fixed(config, _FIXED, str(path))
    for key, value in config.items():
        if value not in (None, False, [], {}) and key not in _HARMLESS and key not in _FIXED:
            raise UserError(f"{path}: {key} = {shown(value)} is not supported; merge the adapter with peft")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        remedy = "save the adapter again with save_pretrained(..., safe_serialization=True)"
        raise UserError(f"{folder}: has no {ADAPTER_WEIGHTS}: {remedy}")
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {name} is not a matrix of finite numbers: the adapter is damaged")
    return AdapterFolder(folder, config, {name: tensor.float() for name, tensor in tensors.items()})


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)


def adapter_config(config: ModelConfig, tune: TuneConfig, base: str) -> dict[str, Any]:
    """The `adapter_config.json` of adapters for the model `base`, which `config` describes."""
    gpt2, parts = layout_of(config) == "gpt2", adapted_parts(config, tune)
    names = tensor_parts(config, layout_of(config))
    modules = sorted({_suffix(part.name) for part, _ in _blocks(config, tune)})
    joined = {layer: len(found) for layer, found in parts.items() if len(names[f"transformer.h.0.{layer}.weight"]) == 1}
    fused = {layer: count for layer, count in joined.items() if count > 1}
    tables = {_suffix(names[name][0].name): name for name in _trained_tables(config, tune)}
    tokens = list(range(*tune.new_tokens))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": tune.lora_rank,
        "lora_alpha": tune.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": gpt2,
        "target_modules": modules,
        "rank_pattern": {layer: tune.lora_rank * count for layer, count in fused.items()},
        "alpha_pattern": {layer: tune.alpha * count for layer, count in fused.items()},
        "trainable_token_indices": dict.fromkeys(tables, tokens) or None,
    }


def adapter_state(state: Mapping[str, Tensor], config: ModelConfig, tune: TuneConfig) -> dict[str, Tensor]:
    """Convert our adapters, by parameter name, to PEFT's tensors."""
    found: dict[str, Tensor] = {}
    for part, blocks in _blocks(config, tune):
        module, rank = _module(part.name), tune.lora_rank
        b = state[blocks[0].name % "B"].new_zeros(part.stop - part.start, rank * len(blocks))
        for number, block in enumerate(blocks):
            b[block.rows, number * rank : (number + 1) * rank] = state[block.name % "B"]
        found[f"{module}.lora_A.weight"] = torch.cat([state[block.name % "A"] for block in blocks])
        found[f"{module}.lora_B.weight"] = b
    for name, rows in _trained_tables(config, tune).items():
        (part,) = tensor_parts(config, layout_of(config))[name]
        found[_module(part.name) + _ROWS] = state[rows].contiguous()
    return found


def from_adapter_state(tensors: Mapping[str, Tensor], config: ModelConfig, tune: TuneConfig, source: str) -> dict[str, Tensor]:
    """The inverse of `adapter_state`; `source` names the tensors in errors."""
    shapes = adapter_shapes(config, tune)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(empty, config, tune).items()}
    if (actual := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != expected:
        different = min(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
        raise UserError(f"{source}: {different}: is not that of the run's adapters: the checkpoint is damaged")
    state: dict[str, Tensor] = {}
    for part, blocks in _blocks(config, tune):
        module, rank = _module(part.name), tune.lora_rank
        for number, block in enumerate(blocks):
            columns = slice(number * rank, (number + 1) * rank)
            state[block.name % "A"] = tensors[f"{module}.lora_A.weight"][columns].clone()
            state[block.name % "B"] = tensors[f"{module}.lora_B.weight"][block.rows, columns].clone()
    for name, rows in _trained_tables(config, tune).items():
        (part,) = tensor_parts(config, layout_of(config))[name]
        state[rows] = tensors[_module(part.name) + _ROWS]
    return state


def _blocks(config: ModelConfig, tune: TuneConfig) -> Iterator[tuple[Part, list[_Block]]]:
    """Each matrix of the other format that has an adapter, with those of ours that it consists of."""
    parts, rows, layout = adapted_parts(config, tune), matrix_rows(config), tensor_parts(config, layout_of(config))
    for layer in range(config.n_layer):
        for name, chosen in parts.items():
            prefix, start = f"transformer.h.{layer}.{name}", 0
            places: dict[Part, list[_Block]] = {}
            for own, height in rows[name].items():
                part = next(part for part in layout[f"{prefix}.weight"] if part.start <= start < part.stop)
                if own in chosen:
                    block = _Block(f"{prefix}.adapter.%s.{own}", slice(start - part.start, start - part.start + height))
                    places.setdefault(part, []).append(block)
                start += height
            yield from places.items()


def _trained_tables(config: ModelConfig, tune: TuneConfig) -> dict[str, str]:
    """The embedding, and the head if it is separate -> the parameter with their trained rows; none without new tokens."""
    names = [name for name in adapter_shapes(config, tune) if name.endswith(".adapter.rows")]
    return {f"{name.removesuffix('adapter.rows')}weight": name for name in names}


def _module(name: str) -> str:
    return _PREFIX + name.removesuffix(".weight")


def _suffix(name: str) -> str:
    """The end of a module's name by which PEFT finds it: GPT-2 has two called `c_proj` in each block."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-1].startswith("c_") else parts[-1]


def rows_needed(adapter: AdapterFolder) -> int:
    """The size of the vocabulary that the adapter needs, because it has embeddings of its own; 0 if it has none."""
    names = (".embed_tokens.weight", ".wte.weight", ".lm_head.weight")
    whole = [tensor.size(0) for name, tensor in adapter.tensors.items() if name.endswith(names) and tensor.ndim]
    indices = [index for name in adapter.tensors if name.endswith(_ROWS) for index in _token_indices(adapter, name)]
    return max([0, *whole, *(index + 1 for index in indices)])


def merged(adapter: AdapterFolder, state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The base model's state dict with the adapter's changes.

    Raises:
        UserError: the adapter is of another model.
    """
    result = {name: tensor.clone() for name, tensor in state.items()}
    targets = {part.name: (name, part) for name, parts in tensor_parts(config, layout_of(config)).items() for part in parts}
    left = dict(adapter.tensors)

    def rows_of(name: str, key: str) -> Tensor:
        """The rows of our parameters that the other format calls `name`."""
        if not key.startswith(_PREFIX) or name not in targets:
            remedy = "merge the adapter with peft"
            raise UserError(f"{adapter.path / ADAPTER_WEIGHTS}: {key}: the base model has no such layer: {remedy}")
        ours, part = targets[name]
        return result[ours][part.start : part.stop]

    for key in [key for key in adapter.tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        weight = rows_of(f"{module.removeprefix(_PREFIX)}.weight", key)
        a, b = left.pop(key), left.pop(f"{module}.lora_B.weight", torch.empty(0))
        if a.ndim != 2 or b.shape != (weight.size(0), a.size(0)) or a.size(1) != weight.size(1):
            sizes = f"[rank, {weight.size(1)}] and [{weight.size(0)}, rank]"
            raise UserError(f"{adapter.path / ADAPTER_WEIGHTS}: {key}: needs two matrices {sizes}: it is of another model")
        weight += _scale(adapter, module, a.size(0)) * (b @ a)
    for key, tensor in left.items():
        name, indices = key.removeprefix(_PREFIX), None
        if key.endswith(_ROWS):
            name, indices = f"{name.removesuffix(_ROWS)}.weight", _token_indices(adapter, key)
        elif ".lora_" in key:
            raise UserError(f"{adapter.path / ADAPTER_WEIGHTS}: {key} is not supported; merge the adapter with peft")
        weight = rows_of(name, key)
        if indices is None and targets[name][0] == EMBEDDING and config.architecture.tied:
            fault = "replaces the embedding, which is also the head of the base model, but not of the adapted one"
            raise UserError(f"{adapter.path / ADAPTER_WEIGHTS}: {key} {fault}: merge the adapter with peft")
        place = range(len(weight)) if indices is None else indices
        value = tensor.t() if indices is None and tensor.ndim == 2 and targets[name][1].transposed else tensor
        if value.shape != (len(place), *weight.shape[1:]) or max(place, default=0) >= len(weight):
            raise UserError(f"{adapter.path / ADAPTER_WEIGHTS}: {key} has shape {list(tensor.shape)}: it is of another model")
        weight[list(place)] = value
    return result


def _scale(adapter: AdapterFolder, module: str, rank: int) -> float:
    """The factor of a module's product, whose rank must be the stated one."""
    config, where = adapter.config, str(adapter.path / ADAPTER_CONFIG)
    stated = _pattern(adapter, "rank_pattern", module, positive_int(config, "r", 8, where))
    if stated != rank:
        raise UserError(f"{where}: r = {shown(stated)}, but {module} has rank {rank}: the files do not belong together")
    alpha = _pattern(adapter, "alpha_pattern", module, positive_number(config, "lora_alpha", 8.0, where))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(adapter: AdapterFolder, key: str, module: str, default: float) -> float:
    """A module's own value in a pattern of the configuration. Patterns are regular expressions; names alone are supported."""
    where, patterns = adapter.path / ADAPTER_CONFIG, adapter.config.get(key) or {}
    valid = isinstance(patterns, Mapping) and all(
        re.fullmatch(r"[\w.]+", name) and type(value) in (int, float) and 0 < value < 1e9 for name, value in patterns.items()
    )
    if not valid:
        raise UserError(f"{where}: {key} = {shown(patterns)}: must map names of layers to positive numbers")
    return next((value for name, value in patterns.items() if f".{module}".endswith(f".{name}")), default)


def _token_indices(adapter: AdapterFolder, key: str) -> list[int]:
    """The tokens whose embeddings are the rows of the tensor `key`."""
    stated, table = adapter.config.get("trainable_token_indices"), key.removesuffix(_ROWS).rpartition(".")[2]
    found = stated.get(table) if isinstance(stated, dict) else stated
    if not isinstance(found, list) or not all(type(index) is int and 0 <= index < 2**24 for index in found):
        fault = f"trainable_token_indices = {shown(stated)}: must list the ids of the tokens in {key}"
        raise UserError(f"{adapter.path / ADAPTER_CONFIG}: {fault}")
    return found
