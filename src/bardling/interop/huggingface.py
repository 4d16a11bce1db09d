"""The Hugging Face format: `config.json` and `model.safetensors`, as `transformers` reads and writes them.

This module has GPT-2 (the names are ours, the vocabulary is not padded, and there are always biases), the conversion of tensors
and the reading of folders; `interop/families.py` has the rest. Conversion is exact. Settings that transformers' configuration
lacks (no biases, vocabulary padding, a single dropout) are stored in `config.json` under the key `bardling`, which transformers
preserves and ignores. Files are untrusted: configurations are checked strictly, tensor sizes are compared with them before
memory is allocated, and pickled weights are refused.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.errors import UserError
from bardling.files.reading import read_json_object
from bardling.interop.families import (
    BARDLING,
    Part,
    bardling_config,
    bardling_section,
    check_fixed,
    dropout_rate,
    layout_of,
    llama_config,
    model_config_from_bardling,
    model_config_from_llama,
    positive_int,
    tensor_parts,
)
from bardling.interop.tensor_file import open_tensors
from bardling.planning.parameter_shapes import EMBEDDING, HEAD, parameter_shapes

_PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model.", BARDLING: ""}
_TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen3": "Qwen3", BARDLING: "this model"}
_BUFFER = re.compile(  # causal masks and rotary frequencies in old files
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
_LAYER = re.compile(r"(?:transformer\.h|model\.layers)\.(\d+)\.")
_ACTIVATIONS: dict[str, Literal["tanh", "erf"]] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED: dict[str, tuple[object, ...]] = {  # settings not implemented here, and their only supported values
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "tie_word_embeddings": (True,),
}
_WEIGHT_FILE = re.compile(r"[^/\\\0]*\.safetensors")
_DTYPES = ("F32", "F16", "BF16")
_T = TypeVar("_T")
_MAX_INDEX_BYTES = 64 << 20  # an index of a thousand shards is far smaller


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `config`, without special tokens.

    A model that `transformers` does not implement gets the `model_type` 'bardling', which it refuses to open.
    """
    layout = layout_of(config)
    if layout == BARDLING:
        return bardling_config(config)
    if layout != "gpt2":
        return llama_config(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        BARDLING: {"bias": config.architecture.bias, "dropout": config.dropout, "vocab_multiple": config.vocab_multiple},
    }


def model_config_from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture described by a `config.json`; `source` names it in errors."""
    kind = values.get("model_type")
    if kind == BARDLING:
        return model_config_from_bardling(values, source)
    if kind in ("llama", "qwen3"):
        return model_config_from_llama(values, source)
    if kind != "gpt2":
        raise UserError(f"{source}: model_type = {kind!r}: only 'gpt2', 'llama', 'qwen3' and 'bardling' are supported")
    check_fixed(values, _FIXED, source)
    n_embd = positive_int(values, "n_embd", 768, source)
    if (inner := values.get("n_inner")) not in (None, 4 * n_embd):
        raise UserError(f"{source}: n_inner = {inner!r} is not supported; it must be null or 4 * n_embd = {4 * n_embd}")
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"{source}: activation_function = {activation!r} is not supported; choose from {', '.join(_ACTIVATIONS)}"
        )
    ours = bardling_section(values, source)
    return ModelConfig(
        n_layer=positive_int(values, "n_layer", 12, source),
        n_head=positive_int(values, "n_head", 12, source),
        n_embd=n_embd,
        block_size=positive_int(values, "n_positions", 1024, source),
        vocab_size=positive_int(values, "vocab_size", GPT2_VOCAB_SIZE, source),
        dropout=_dropout(values, ours, source),
        bias=ours.get("bias", True),
        gelu=_ACTIVATIONS[activation],
        # No tensor in the file confirms the padding, so it is limited.
        vocab_multiple=positive_int(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
    )


def _dropout(values: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> float:
    """Our single dropout, or the value that GPT-2's three dropouts share (0.1 if missing)."""
    found = {"bardling.dropout": ours["dropout"]} if "dropout" in ours else {key: values.get(key, 0.1) for key in _DROPOUTS}
    rates = {dropout_rate(key, value, source) for key, value in found.items()}
    if len(rates) > 1:
        listed = ", ".join(f"{key} = {value}" for key, value in found.items())
        raise UserError(f"{source}: {listed}: different dropouts are not supported; set all three to the same value")
    return rates.pop()


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `config` in the Hugging Face layout; GPT-2 has biases regardless of `config.bias`."""
    ours, shapes = parameter_shapes(config), {}
    for name, parts in tensor_parts(config).items():
        for part in parts:
            shape = (part.stop - part.start, *ours[name][1:])
            shapes[part.name] = shape[::-1] if part.transposed else shape
            if layout_of(config) == "gpt2" and name.endswith(".weight") and not name.endswith((".wte.weight", ".wpe.weight")):
                shapes[name.removesuffix("weight") + "bias"] = ours[name][:1]
    return shapes


def hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert tensors by parameter name (weights, gradients or moments) to the Hugging Face layout: contiguous, not padded.

    A GPT-2 without biases gets zero biases, which Hugging Face's requires. A tied `lm_head.weight` is left out.
    """
    parts, converted = tensor_parts(config), {}
    for name, tensor in state.items():
        for part in parts[name]:
            rows = tensor[part.start : part.stop]
            converted[part.name] = (rows.t() if part.transposed else rows).contiguous()
    if not config.architecture.bias:
        for name, shape in hf_shapes(config).items():
            if name not in converted:
                converted[name] = torch.zeros(shape, dtype=state[EMBEDDING].dtype, device=state[EMBEDDING].device)
    return converted


def _join(tensors: Mapping[str, Tensor], parts: tuple[Part, ...], rows: int) -> Tensor:
    """The parameter with `rows` rows that was split into `parts`; padding rows are zero."""
    found = [tensors[part.name].t() if part.transposed else tensors[part.name] for part in parts]
    if rows > parts[-1].stop:
        found.append(found[0].new_zeros(rows - parts[-1].stop, *found[0].shape[1:]))
    return found[0].contiguous() if len(found) == 1 else torch.cat(found)


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig, source: str = "the weights") -> dict[str, Tensor]:
    """Convert tensors in the Hugging Face layout, with or without the prefix `transformer.`, to our state dict.

    Causal-mask buffers and a head equal to the embedding are dropped, as are the zero biases of a model without biases; any
    other difference from `config` is refused. `source` names the tensors in errors.
    """
    named = {_full_name(name, config): tensor for name, tensor in state.items()}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in named.items()}, config, source)
    parts = tensor_parts(config)
    (embedding,) = parts[EMBEDDING]
    if HEAD in named and HEAD not in parts and not torch.equal(named[HEAD], named[embedding.name]):
        raise UserError(f"{source}: {HEAD} differs from {embedding.name}, but the configuration ties the head")
    known = {HEAD, *(part.name for group in parts.values() for part in group)}
    for name, tensor in named.items():
        if name not in known and not _BUFFER.fullmatch(name) and bool(torch.any(tensor != 0)):
            raise UserError(f"{source}: {name} is not zero, but model.bias = False: use a configuration with biases")
    return {name: _join(named, parts[name], shape[0]) for name, shape in parameter_shapes(config).items()}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Refuse tensor shapes that are not those of `config`, before any memory is allocated."""
    shapes = {_full_name(name, config): shape for name, shape in shapes.items()}
    layers = {int(match[1]) for match in map(_LAYER.match, shapes) if match}
    if len(layers) != config.n_layer:
        raise UserError(f"{source}: has {len(layers)} layers, but the configuration says n_layer = {config.n_layer}")
    expected, parts = hf_shapes(config), tensor_parts(config)
    for name in (part.name for group in parts.values() for part in group):
        if name not in shapes:
            raise UserError(f"{source}: {name} is missing: the file is incomplete or of another architecture")
    (embedding,) = parts[EMBEDDING]
    for name, shape in shapes.items():
        if _BUFFER.fullmatch(name):
            continue
        want = expected.get(embedding.name if name == HEAD else name)
        if want is None:
            raise UserError(f"{source}: {name} is not part of {_TITLES[layout_of(config)]}")
        if shape != want:
            raise UserError(f"{source}: {name} has shape {list(shape)}, but the configuration needs {list(want)}")


def _full_name(name: str, config: ModelConfig) -> str:
    prefix = _PREFIXES[layout_of(config)]
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def read_hf_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read `config.json` and `model.safetensors` (or its shards and their index): the architecture and our state dict, float32
    on the CPU.
    """
    path = folder / "config.json"
    config = model_config_from_hf(read_json_object(path, limit=_MAX_INDEX_BYTES), str(path))
    files = _weight_files(folder)
    _check_shapes(_read_each(files, _shape), config, str(folder))
    state = _read_each(files, _float_copy)
    refuse_nonfinite(state, folder)
    return config, from_hf_state(state, config, str(folder))


def refuse_nonfinite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a `UserError` if a weight is NaN or infinite; `where` names the model."""
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} contains NaN or infinity: the model is damaged")


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files, and which tensors to read from each (None: all)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        if pickled := sorted(folder.glob("*.bin")):
            raise UserError(
                f"{pickled[0]}: pickled weights can execute code and are refused: "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{folder}: has no model.safetensors")
    weight_map = read_json_object(index, limit=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must map each tensor's name to a file")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file) or len(file) > 200:
            raise UserError(f"{index}: {file!r} is not the name of a .safetensors file in this folder")
        files.setdefault(folder / file, []).append(name)
    return {**files}


def _read_each(files: Mapping[Path, list[str] | None], read: Callable[[Path, Any, str], _T]) -> dict[str, _T]:
    """Call `read(path, open file, name)` for each tensor listed in `files`."""
    result: dict[str, _T] = {}
    for path, names in files.items():
        with open_tensors(path) as file:
            known = set(file.keys())
            if missing := [name for name in names or () if name not in known]:
                raise UserError(f"{path}: {missing[0]} is missing: the file does not match its index")
            result |= {name: read(path, file, name) for name in names or sorted(known)}
    return result


def _shape(path: Path, file: Any, name: str) -> tuple[int, ...]:
    entry = file.get_slice(name)
    is_buffer = any(_BUFFER.fullmatch(prefix + name) for prefix in _PREFIXES.values())
    if entry.get_dtype() not in _DTYPES and not is_buffer:
        raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}; weights must be {', '.join(_DTYPES)}")
    return tuple(entry.get_shape())


def _float_copy(path: Path, file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.to(torch.float32, copy=True)  # a copy, because the tensor is mapped and the file may change
