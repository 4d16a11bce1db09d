"""What the readers of nanoGPT and nano-gpt checkpoints share: a GPT-2's tensors by name, checked, padded and copied.

Shapes: V vocabulary, V' vocabulary padded to the model's multiple, C width.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.interop.torch_file import load_torch_file
from bardling.planning.parameter_shapes import EMBEDDING, HEAD, parameter_shapes

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_LOSS_YET = 1e9  # nanoGPT's best_val_loss before the first evaluation
_MASK = re.compile(r"transformer\.h\..*\.attn\.(masked_)?bias")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A checkpoint of another trainer, ready for `GPT.load_state_dict` and `load_optimizer_tensors`."""

    origin: str  # 'nanoGPT' or 'nano-gpt'
    config: ModelConfig
    weights: dict[str, Tensor]  # float32, contiguous, in their own memory; the embedding is padded with zeros to [V', C]
    optimizer: dict[str, Tensor] | None  # AdamW's `<parameter>.step`, `.exp_avg` and `.exp_avg_sq`; None if there are none
    step: int  # optimizer steps done
    best_val_loss: float | None
    settings: dict[str, Any]  # the other trainer's settings, plain values

    @property
    def optimizer_meta(self) -> dict[str, Any]:
        """What `load_optimizer_tensors` needs besides the tensors."""
        return {"optimizer": "AdamW", "scalars": {}, "without_state": []}


def import_checkpoint(
    path: Path, origin: str, content: dict[str, Any], config: ModelConfig, settings: dict[str, Any], *keys: str
) -> ImportedCheckpoint:
    """Read the model, optimizer state, step and loss in `content`, whose names in it are `keys`, in this order."""
    model, optimizer, step, loss = keys
    return ImportedCheckpoint(
        origin=origin,
        config=config,
        weights=_model_weights(path, content[model], config),
        optimizer=_adamw_state(path, content.get(optimizer), config),
        step=0 if content.get(step) is None else _integer_at(path, content, step, 0),
        best_val_loss=_loss_at(path, content, loss),
        settings=settings,
    )


def model_config_from_sizes(
    path: Path, table: Mapping[str, Any], *, bias: bool, dropout: float, gelu: Literal["tanh", "erf"]
) -> ModelConfig:
    """The GPT-2 with the `SIZES` given in `table`."""
    sizes: dict[str, Any] = {key: _integer_at(path, table, key, 1) for key in SIZES}
    try:
        return ModelConfig(**sizes, dropout=dropout, bias=bias, gelu=gelu)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def unpadded_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a GPT-2's parameters with the embedding [V, C], in the order of nanoGPT's `named_parameters`."""
    return {**parameter_shapes(config), EMBEDDING: (config.vocab_size, config.n_embd)}


def optimizer_order(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """The AdamW parameter groups of both trainers: matrices (weight decay), then vectors (no weight decay)."""
    decayed = [name for name, shape in shapes.items() if len(shape) >= 2]
    return decayed, [name for name, shape in shapes.items() if len(shape) < 2]


def read_content(path: Path, trainer: str, required: tuple[str, ...]) -> dict[str, Any]:
    """The top-level dict of a file written by `torch.save`, which must contain the keys `required`."""
    content = string_keyed(path, load_torch_file(path), "content")
    if missing := [key for key in required if key not in content]:
        remedy = "give a folder that transformers' save_pretrained(...) wrote"
        raise UserError(f"{path}: has no {missing[0]!r}: it is not a {trainer} checkpoint; of other models, {remedy}")
    return content


def string_keyed(path: Path, value: object, what: str) -> dict[str, Any]:
    """`value` as a dict with string keys, or an error that names `what` it should have been."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: its {what!r} is not a dict with string keys: damaged, or not a checkpoint of this kind")
    return dict(value)


def _model_weights(path: Path, state: object, config: ModelConfig) -> dict[str, Tensor]:
    """The parameters in a state dict, without the prefix `_orig_mod.`, checked against `config`, padded and copied.

    Causal masks (`attn.bias`) are dropped; a head stored beside the embedding must equal it.
    """
    tensors = {name.removeprefix("_orig_mod."): value for name, value in string_keyed(path, state, "model").items()}
    if config.n_layer > len(tensors):
        raise UserError(f"{path}: describes {config.n_layer} layers, but has {len(tensors)} tensors")
    shapes = unpadded_shapes(config)
    for name, shape in shapes.items():
        _check_tensor(path, name, tensors.get(name), shape)
    if unknown := sorted(name for name in tensors if name not in shapes and name != HEAD and not _MASK.fullmatch(name)):
        raise UserError(f"{path}: the tensor {unknown[0]!r} is not part of the model it describes")
    if HEAD in tensors:
        _check_tensor(path, HEAD, tensors[HEAD], shapes[EMBEDDING])
        if tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr() and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise UserError(f"{path}: its head differs from its embedding; only models with a tied head can be imported")
    return {name: _padded(name, tensors[name], config) for name in shapes}


def _adamw_state(path: Path, state: object, config: ModelConfig) -> dict[str, Tensor] | None:
    """AdamW's numbered state as tensors by name; None if it is empty or missing (None).

    Parameters are numbered through the two groups of `optimizer_order`. The first versions of nanoGPT sorted the names within
    each group; the shapes show which order a file has.
    """
    if state is None:
        return None
    content = string_keyed(path, state, "optimizer")
    numbered, groups = content.get("state"), content.get("param_groups")
    if not isinstance(numbered, Mapping) or not isinstance(groups, list) or len(groups) != 2:
        raise UserError(f"{path}: its optimizer state is not that of an AdamW with two parameter groups")
    if not numbered:
        return None
    shapes = unpadded_shapes(config)
    decayed, others = optimizer_order(shapes)
    entries: list[Any] = [numbered.get(number) for number in range(len(shapes))]
    found = [getattr(entry.get("exp_avg"), "shape", None) if isinstance(entry, Mapping) else None for entry in entries]
    for names in (decayed + others, sorted(decayed) + sorted(others)):
        if found == [shapes[name] for name in names]:
            break
    else:
        raise UserError(f"{path}: its optimizer state does not match its model")
    if len(numbered) != len(names):
        raise UserError(f"{path}: its optimizer state has {len(numbered)} entries for {len(names)} parameters")
    result: dict[str, Tensor] = {}
    for name, entry in zip(names, entries, strict=True):
        for key in MOMENTS:
            _check_tensor(path, f"{name}.{key}", entry.get(key), shapes[name])
            result[f"{name}.{key}"] = _padded(name, entry[key], config)
        result[f"{name}.step"] = torch.tensor(number_at(path, entry, "step"), dtype=torch.float32)
    return result


def number_at(path: Path, table: Mapping[str, Any], key: str) -> float:
    """A number in a table, stored as a number or as a tensor with one element."""
    value = _item(table.get(key))
    if type(value) not in (int, float) or value != value or (isinstance(value, int) and value.bit_length() > 1000):
        raise UserError(f"{path}: its {key!r} is not a number")
    return float(value)


def _loss_at(path: Path, table: Mapping[str, Any], key: str) -> float | None:
    """A loss in a table; None if there is none yet (missing, NaN or `NO_LOSS_YET`)."""
    value = _item(table.get(key))
    missing = value is None or (isinstance(value, float) and (math.isnan(value) or value == NO_LOSS_YET))
    return None if missing else number_at(path, table, key)


def _integer_at(path: Path, table: Mapping[str, Any], key: str, minimum: int) -> int:
    value = table.get(key)
    if type(value) is not int or not minimum <= value < 1 << 40:
        raise UserError(f"{path}: its {key!r} is not an integer of at least {minimum}")
    return value


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are booleans, numbers or strings."""
    return {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_tensor(path: Path, name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: the tensor {name!r} of the model it describes is missing")
    if tuple(value.shape) != shape or not value.is_floating_point():
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise UserError(f"{path}: the tensor {name!r} is {found}, but the model it describes has {list(shape)}")
    # A tensor may be a view that repeats a few bytes many times; copying it could take any amount of memory.
    if not value.is_contiguous() or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise UserError(f"{path}: the tensor {name!r} is not stored contiguously")


def _padded(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """A float32 copy; the embedding [V, C] gets zero rows up to [V', C]."""
    copy = value.detach().to(torch.float32, copy=True)
    return pad(copy, (0, 0, 0, config.padded_vocab_size - config.vocab_size)) if name == EMBEDDING else copy
