"""What the importers of other trainers' checkpoints share: a GPT-2's tensors by name, checked, padded and copied.

Shapes: V vocabulary, V' vocabulary padded to the model's multiple, T context, C width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.errors import UserError

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A checkpoint of another trainer, ready for `GPT.load_state_dict` and `load_optimizer_tensors`."""

    origin: str
    """'nanoGPT' or 'nano-gpt'."""
    config: ModelConfig
    weights: dict[str, Tensor]
    """float32, contiguous, own memory; the embedding padded with zeros to [V', C]."""
    optimizer: dict[str, Tensor] | None
    """AdamW's `<parameter>.step`, `.exp_avg` and `.exp_avg_sq`; None when the checkpoint has none."""
    step: int
    """Updates done."""
    best_val_loss: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    """The trainer's own settings, plain values."""

    @property
    def optimizer_meta(self) -> dict[str, Any]:
        """What `load_optimizer_tensors` wants besides the tensors."""
        return {"optimizer": "AdamW", "scalars": {}, "without_state": []}


def described_model(
    path: Path, table: Mapping[str, Any], *, bias: bool, dropout: float, gelu: Literal["tanh", "erf"]
) -> ModelConfig:
    """The model whose `SIZES` stand in `table`."""
    n_layer, n_head, n_embd, block_size, vocab_size = (whole_in(path, table, key, 1) for key in SIZES)
    try:
        return ModelConfig(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=block_size,
            vocab_size=vocab_size,
            dropout=dropout,
            bias=bias,
            gelu=gelu,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a GPT-2's parameters without padding, in the order in which nanoGPT's `named_parameters` gives them."""
    c = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, c), "transformer.wpe.weight": (config.block_size, c)}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]

    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        add(f"{block}.ln_1", c)
        add(f"{block}.attn.c_attn", 3 * c, c)
        add(f"{block}.attn.c_proj", c, c)
        add(f"{block}.ln_2", c)
        add(f"{block}.mlp.c_fc", 4 * c, c)
        add(f"{block}.mlp.c_proj", c, 4 * c)
    add("transformer.ln_f", c)
    return shapes


def optimizer_order(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """nanoGPT's two AdamW groups, which both trainers use: tensors of two dimensions decay, the others do not."""
    return [name for name, shape in shapes.items() if len(shape) >= 2], [
        name for name, shape in shapes.items() if len(shape) < 2
    ]


def text_keys(path: Path, value: object, what: str) -> dict[str, Any]:
    """`value` as a dict with text keys, or an error that says what it should have been."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: its {what!r} is not a table of named values: it is not such a checkpoint, or damaged")
    return dict(value)


def model_weights(path: Path, state: object, config: ModelConfig) -> dict[str, Tensor]:
    """The parameters in a state dict, with `_orig_mod.` taken off, checked against `config`, padded and copied.

    Causal masks (`attn.bias`) are left out; a head stored beside the embedding must equal it.
    """
    tensors = {name.removeprefix("_orig_mod."): value for name, value in text_keys(path, state, "model").items()}
    if config.n_layer > len(tensors):
        raise UserError(f"{path}: describes {config.n_layer} layers, but has {len(tensors)} tensors")
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        _check_tensor(path, name, tensors.get(name), shape)
    extra = sorted(name for name in tensors if name not in shapes and name != HEAD and not _is_mask(name))
    if extra:
        raise UserError(f"{path}: has the tensor {extra[0]!r}, which belongs to no part of the model it describes")
    if HEAD in tensors:
        _check_tensor(path, HEAD, tensors[HEAD], shapes[EMBEDDING])
        if tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr() and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise UserError(f"{path}: its head differs from its embedding; only models that share the two can be imported")
    return {name: _padded(name, tensors[name], config) for name in shapes}


def adamw_state(path: Path, state: object, config: ModelConfig) -> dict[str, Tensor] | None:
    """AdamW's numbered state as tensors by name; None when it is empty.

    The numbers follow nanoGPT's two groups. Its first versions sorted the names within each; which order a file has shows in
    the shapes.
    """
    content = text_keys(path, state, "optimizer")
    numbered, groups = content.get("state"), content.get("param_groups")
    if not isinstance(numbered, Mapping) or not isinstance(groups, list) or len(groups) != 2:
        raise UserError(f"{path}: its optimizer state is not that of an AdamW with two groups")
    if not numbered:
        return None
    shapes = parameter_shapes(config)
    order = optimizer_order(shapes)
    for names in ([*order[0], *order[1]], [*sorted(order[0]), *sorted(order[1])]):
        if all(_moment_shape(numbered.get(number)) == shapes[name] for number, name in enumerate(names)):
            break
    else:
        raise UserError(f"{path}: its optimizer state does not fit its model")
    if set(numbered) != set(range(len(names))):
        raise UserError(f"{path}: its optimizer state has {len(numbered)} entries for {len(names)} parameters")
    result: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        entry = numbered[number]
        for key in MOMENTS:
            _check_tensor(path, f"{name}.{key}", entry.get(key), shapes[name])
            result[f"{name}.{key}"] = _padded(name, entry[key], config)
        result[f"{name}.step"] = torch.tensor(number_in(path, entry, "step"), dtype=torch.float32)
    return result


def number_in(path: Path, table: Mapping[str, Any], key: str) -> float:
    """A number in a table, kept as a number or as a tensor of one."""
    value = table.get(key)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise UserError(f"{path}: its {key!r} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{path}: its {key!r} is too large a number") from None


def loss_in(path: Path, table: Mapping[str, Any], key: str) -> float | None:
    """A loss in a table; None where there is none or the run had diverged to NaN."""
    value = table.get(key)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return number_in(path, table, key)


def whole_in(path: Path, table: Mapping[str, Any], key: str, low: int) -> int:
    """A whole number of at least `low` in a table."""
    value = table.get(key)
    if type(value) is not int or not low <= value < 1 << 40:
        raise UserError(f"{path}: its {key!r} is not a whole number of at least {low}")
    return value


def _is_mask(name: str) -> bool:
    return name.startswith("transformer.h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def _moment_shape(entry: object) -> tuple[int, ...] | None:
    moment = entry.get("exp_avg") if isinstance(entry, Mapping) else None
    return tuple(moment.shape) if isinstance(moment, Tensor) else None


def _check_tensor(path: Path, name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: lacks the tensor {name!r}, which a model of its description has")
    if tuple(value.shape) != shape or not value.is_floating_point():
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise UserError(f"{path}: the tensor {name!r} is {found}, but a model of its description has {list(shape)} there")
    # A tensor may be a view that repeats few bytes many times over; copying such a one could take any amount of memory.
    if not value.is_contiguous() or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise UserError(f"{path}: the tensor {name!r} is not stored whole")


def _padded(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """A float32 copy; the embedding [V, C] gets zero rows up to [V', C]."""
    if name != EMBEDDING:
        return value.detach().to(torch.float32, copy=True)
    rows = torch.zeros(config.padded_vocab_size, config.n_embd)  # [V', C]
    rows[: config.vocab_size] = value.detach()
    return rows
