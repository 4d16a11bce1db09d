"""The Hugging Face format: `config.json` and `model.safetensors`, as `transformers` reads and writes them.

This module has GPT-2 (the names are ours, the vocabulary is not padded, and there are always biases), the conversion of tensors
and the reading of folders; `interop/families.py` has the rest. Conversion is exact. Settings that transformers' configuration
lacks (no biases, vocabulary padding, a single dropout) are stored in `config.json` under the key `bardling`, which transformers
preserves and ignores. Files are untrusted: configurations are checked strictly, tensor sizes are compared with them before
memory is allocated, and pickled weights are refused.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.config.model import MAX_LAYERS
from bardling.errors import UserError
from bardling.files.reading import read_json_object
from bardling.interop.families import (
    BARDLING,
    Layout,
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
    positive_number,
    shown,
    tensor_parts,
)
from bardling.interop.tensor_file import Computed, LazyTensors, open_tensors
from bardling.interop.weight_index import INDEX, MAX_INDEX_BYTES, indexed_files
from bardling.planning.parameter_shapes import EMBEDDING, HEAD, parameter_shapes

_PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model.", BARDLING: ""}
_TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen3": "Qwen3", BARDLING: "this model"}
_BUFFER = re.compile(  # causal masks and rotary tables in old files
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)"
)
_LAYER = re.compile(r"(?:transformer\.h|model\.layers)\.(\d+)\.")
_ACTIVATIONS: dict[str, Literal["tanh", "erf"]] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"), "tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "erf"),
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED: dict[str, tuple[object, ...]] = {  # settings not implemented here, and their only supported values
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False, None),
}
_ALIASES = {  # other names of GPT-2's sizes, which transformers accepts too
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_T = TypeVar("_T")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `config`, without special tokens.

    A model that `transformers` does not implement gets the `model_type` 'bardling', which it refuses to open.
    """
    layout, arch = layout_of(config), config.architecture
    if layout == BARDLING:
        return bardling_config(config)
    if layout != "gpt2":
        return llama_config(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None if arch.mlp_hidden == 4 * config.n_embd else arch.mlp_hidden,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": arch.norm_eps,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": arch.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        BARDLING: {"bias": arch.bias, "dropout": config.dropout, "vocab_multiple": config.vocab_multiple},
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
    values = {**{ours: values[theirs] for theirs, ours in _ALIASES.items() if theirs in values}, **values}
    n_embd = positive_int(values, "n_embd", 768, source)
    inner = None if values.get("n_inner") is None else positive_int(values, "n_inner", 0, source)
    eps = positive_number(values, "layer_norm_epsilon", 1e-5, source)
    tied, activation = values.get("tie_word_embeddings", True), values.get("activation_function", "gelu_new")
    if not isinstance(tied, bool):
        raise UserError(f"{source}: tie_word_embeddings = {shown(tied)}: must be true or false")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        choices = ", ".join(_ACTIVATIONS)
        raise UserError(f"{source}: activation_function = {shown(activation)} is not supported; choose from {choices}")
    ours = bardling_section(values, source)
    return ModelConfig(
        n_layer=positive_int(values, "n_layer", 12, source, limit=MAX_LAYERS),
        n_head=positive_int(values, "n_head", 12, source),
        n_embd=n_embd,
        block_size=positive_int(values, "n_positions", 1024, source),
        vocab_size=positive_int(values, "vocab_size", GPT2_VOCAB_SIZE, source),
        dropout=max(_dropouts(values, ours, source).values()),
        bias=ours.get("bias", True),
        gelu=_ACTIVATIONS[activation],
        # No tensor in the file confirms the padding, so it is limited.
        vocab_multiple=positive_int(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
        # Values that are the family's stay unset.
        norm_eps=None if eps == 1e-5 else eps,
        mlp_hidden=None if inner == 4 * n_embd else inner,
        tied=None if tied else False,
    )


def _dropouts(values: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> dict[str, float]:
    """Our single dropout, or GPT-2's three (0.1 if missing)."""
    found = {"bardling.dropout": ours["dropout"]} if "dropout" in ours else {key: values.get(key, 0.1) for key in _DROPOUTS}
    return {key: dropout_rate(key, value, source) for key, value in found.items()}


def dropout_note(path: Path) -> str:
    """How a `config.json` with several dropouts is read: only training depends on them. Empty if it has one."""
    values = read_json_object(path, limit=MAX_INDEX_BYTES)
    found = _dropouts(values, bardling_section(values, str(path)), str(path)) if values.get("model_type") == "gpt2" else {}
    listed = ", ".join(f"{key} = {value}" for key, value in found.items())
    several = len(set(found.values())) > 1
    return f"{path}: {listed}: here a model has a single dropout, which training takes from model.dropout" if several else ""


def hf_shapes(config: ModelConfig, layout: Layout | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `config` in a layout (None: its own); GPT-2's has biases whatever `config.bias` is."""
    ours, shapes, layout = parameter_shapes(config), {}, layout or layout_of(config)
    for name, parts in tensor_parts(config, layout).items():
        for part in parts:
            shape = (part.stop - part.start, *ours[name][1:])
            shapes[part.name] = shape[::-1] if part.transposed else shape
            if layout == "gpt2" and name.endswith(".weight") and not name.endswith((".wte.weight", ".wpe.weight", HEAD)):
                shapes[name.removesuffix("weight") + "bias"] = ours[name][:1]
    return shapes


def hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert tensors by parameter name (weights, gradients or moments) to the Hugging Face layout: contiguous, not padded.

    `state` may have some of the parameters only. A GPT-2 without biases gets zero biases, which Hugging Face's requires. A tied
    `lm_head.weight` is left out.
    """
    parts, converted = tensor_parts(config, layout_of(config)), {}
    for name, tensor in state.items():
        for part in parts[name]:
            rows = tensor[part.start : part.stop]
            converted[part.name] = (rows.t() if part.transposed else rows).contiguous()
    if not config.architecture.bias:
        for name, shape in hf_shapes(config).items():
            like = state.get(f"{name.removesuffix('bias')}weight")
            if name not in converted and like is not None:
                converted[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return converted


def _join(tensors: Mapping[str, Tensor], parts: tuple[Part, ...], rows: int) -> Tensor:
    """The parameter with `rows` rows that was split into `parts`; padding rows are zero."""
    found = [tensors[part.name].t() if part.transposed else tensors[part.name] for part in parts]
    if rows > parts[-1].stop:
        found.append(found[0].new_zeros(rows - parts[-1].stop, *found[0].shape[1:]))
    return found[0].contiguous() if len(found) == 1 else torch.cat(found)


def from_hf_state(
    state: Mapping[str, Tensor], config: ModelConfig, source: str = "the weights", layout: Layout | None = None
) -> Mapping[str, Tensor]:
    """Convert tensors in the Hugging Face layout, with or without the prefix `transformer.`, to our state dict.

    Causal-mask buffers and a head equal to the embedding are dropped, as are the zero biases of a model without biases; any
    other difference from `config` is refused. `source` names the tensors in errors; `layout` is that of the file, its
    `model_type` (None: that in which the model would be written). From lazy tensors, the result is lazy too.
    """
    layout = layout or layout_of(config)
    lazy = state if isinstance(state, LazyTensors) else None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()} if lazy is None else lazy.shapes
    _check_shapes(shapes, config, source, layout)
    full = {_full_name(name, layout): name for name in shapes}
    named = Computed({name: partial(state.__getitem__, own) for name, own in full.items()})
    parts = tensor_parts(config, layout)
    (embedding,) = parts[EMBEDDING]
    if HEAD in named and HEAD not in parts and not torch.equal(named[HEAD], named[embedding.name]):
        raise UserError(f"{source}: {HEAD} differs from {embedding.name}, but the configuration ties the head")
    known = {HEAD, *(part.name for group in parts.values() for part in group)}
    for name in named:
        if name not in known and not _BUFFER.fullmatch(name) and bool(torch.any(named[name] != 0)):
            raise UserError(f"{source}: {name} is not zero, but model.bias = False: use a configuration with biases")
    joined = Computed({name: partial(_join, named, parts[name], rows[0]) for name, rows in parameter_shapes(config).items()})
    return joined if lazy is not None else dict(joined)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str, layout: Layout) -> None:
    """Refuse tensor shapes that are not those of `config`, before any memory is allocated."""
    shapes = {_full_name(name, layout): shape for name, shape in shapes.items()}
    layers = {int(match[1]) for match in map(_LAYER.match, shapes) if match}
    if len(layers) != config.n_layer:
        raise UserError(f"{source}: has {len(layers)} layers, but the configuration says n_layer = {config.n_layer}")
    expected, parts = hf_shapes(config, layout), tensor_parts(config, layout)
    for name in (part.name for group in parts.values() for part in group):
        if name not in shapes:
            raise UserError(f"{source}: {name} is missing: the file is incomplete or of another architecture")
    (embedding,) = parts[EMBEDDING]
    for name, shape in shapes.items():
        if _BUFFER.fullmatch(name):
            continue
        want = expected.get(embedding.name if name == HEAD else name)
        if want is None:
            raise UserError(f"{source}: {name} is not part of {_TITLES[layout]}")
        if shape != want:
            raise UserError(f"{source}: {name} has shape {list(shape)}, but the configuration needs {list(want)}")


def _full_name(name: str, layout: Layout) -> str:
    prefix = _PREFIXES[layout]
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def read_hf_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read `config.json` and `model.safetensors` (or its shards and their index): the architecture and our state dict, float32
    on the CPU.
    """
    path = folder / "config.json"
    values = read_json_object(path, limit=MAX_INDEX_BYTES)
    config, layout = model_config_from_hf(values, str(path)), values["model_type"]
    files = weight_files(folder)
    _check_shapes(_read_each(files, _shape), config, str(folder), layout)
    state = _read_each(files, _float_copy)
    refuse_nonfinite(state, folder)
    return config, dict(from_hf_state(state, config, str(folder), layout))


def hf_dtype(folder: Path) -> str:
    """The dtype of the weights in a folder that `read_hf_folder` has read; of different ones, float32."""
    found = set(_read_each(weight_files(folder), lambda _, file, name: str(file.get_slice(name).get_dtype())).values())
    return _DTYPES[found.pop()] if len(found) == 1 else "float32"


def refuse_nonfinite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a `UserError` if a weight is NaN or infinite; `where` names the model."""
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} contains NaN or infinity: the model is damaged")


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files, and which tensors to read from each (None: all)."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return {single: None}
    if index.is_file():
        return {**indexed_files(index)}
    if pickled := sorted(folder.glob("*.bin")):
        raise UserError(
            f"{pickled[0]}: pickled weights can execute code and are refused: "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )
    if found := sorted(folder.glob("*.gguf")):
        raise UserError(f"{folder}: its weights are a GGUF file: give that file instead, {found[0]}")
    if found := sorted(folder.glob("*.onnx")):
        raise UserError(f"{found[0]}: ONNX files are not read: use the model from which this one was exported")
    remedy = "open the model with transformers and save it with save_pretrained(...)"
    raise UserError(f"{folder}: has no model.safetensors and no {INDEX}: {remedy}")


def _read_each(files: Mapping[Path, list[str] | None], read: Callable[[Path, Any, str], _T]) -> dict[str, _T]:
    """Call `read(path, open file, name)` for each tensor listed in `files`."""
    result: dict[str, _T] = {}
    for path, names in files.items():
        with open_tensors(path) as file:
            known = {name for name in file.keys() if not _is_buffer(name)}  # noqa: SIM118
            if missing := [name for name in names or () if name not in known and not _is_buffer(name)]:
                raise UserError(f"{path}: {missing[0]} is missing: the file does not match its index")
            result |= {name: read(path, file, name) for name in sorted(known if names is None else known.intersection(names))}
    return result


def _is_buffer(name: str) -> bool:
    """Whether a tensor is a mask or a table, which models compute themselves: its values, perhaps infinite, do not matter."""
    return any(_BUFFER.fullmatch(prefix + name) for prefix in ("", *_PREFIXES.values()))


def _shape(path: Path, file: Any, name: str) -> tuple[int, ...]:
    entry = file.get_slice(name)
    if entry.get_dtype() not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}; weights must be {', '.join(_DTYPES)}")
    return tuple(entry.get_shape())


def _float_copy(path: Path, file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.to(torch.float32, copy=True)  # a copy, because the tensor is mapped and the file may change
