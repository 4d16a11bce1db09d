"""Hugging Face's format: `config.json` and `model.safetensors`, as `transformers` writes and opens them.

GPT-2's parameter names are already those of `GPT2LMHeadModel`. What differs: its four linear layers of a block keep their
matrices [in, out] where ours are [out, in]; its vocabulary is not padded; it always has biases. Llama and Qwen3, and what no
family of `transformers` computes, are in `interop/families.py`, which also has the table of tensors that the conversion here
follows, for weights and for an optimizer's moments alike. All of it is exact: a round trip gives back the same bits.

What transformers' configuration cannot say (no biases, the padding, one dropout for all places) is kept under the key
`bardling` in `config.json`, which transformers preserves and does not interpret.

Files come from strangers: configurations are read strictly and sizes are compared with the configuration before memory
is taken; pickled weights are refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.interop.families import (
    OWN,
    Part,
    layout_of,
    own_config,
    own_model_config,
    read_ours,
    rotary_config,
    rotary_model_config,
    tensor_parts,
    whole,
)
from bardling.interop.shapes import EMBEDDING, HEAD, parameter_shapes
from bardling.model.gpt import GPT

__all__ = [
    "METADATA",
    "check_hf_shapes",
    "from_hf_state",
    "hf_config",
    "hf_shapes",
    "hf_state",
    "load_hf_folder",
    "model_config_from_hf",
    "parameter_shapes",
]

METADATA = {"format": "pt"}
"""What `transformers` looks for in the metadata of a safetensors file."""

_PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model.", OWN: ""}
_TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen3": "Qwen3", OWN: "this model"}
_BUFFER = re.compile(  # causal masks and wavelengths that old files carry
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
_LAYER = re.compile(r"(?:transformer\.h|model\.layers)\.(\d+)\.")
_ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED: dict[str, tuple[object, ...]] = {  # settings with one meaning here, and the values that mean it
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
_DTYPES = ("F32", "F16", "BF16")
_T = TypeVar("_T")
_MAX_JSON = 64 << 20  # bytes; a real index of a thousand shards is far smaller


# ---- configuration ----


def hf_config(config: ModelConfig, *, eot_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of `config`, for the model of `transformers` that computes it; `eot_id` is the token that ends a text,
    if there is one. A model that none computes gets the `model_type` 'bardling', which transformers refuses to open."""
    layout = layout_of(config)
    if layout == OWN:
        return own_config(config)
    if layout != "gpt2":
        return rotary_config(config, eot_id=eot_id)
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
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
        OWN: {"bias": config.architecture.bias, "dropout": config.dropout, "vocab_multiple": config.vocab_multiple},
    }


def model_config_from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes. `source` names it in errors.

    Raises:
        UserError: another kind of model, a value of the wrong kind, or a setting that is not implemented here.
    """
    kind = values.get("model_type")
    if kind == OWN:
        return own_model_config(values, source)
    if kind in ("llama", "qwen3"):
        return rotary_model_config(values, source)
    if kind != "gpt2":
        raise UserError(f"{source}: model_type = {kind!r}: only 'gpt2', 'llama', 'qwen3' and 'bardling' are supported")
    for key, allowed in _FIXED.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{source}: {key} = {values[key]!r} is not supported; it must be {allowed[0]!r}")
    n_embd = whole(values, "n_embd", 768, source)
    if values.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(
            f"{source}: n_inner = {values['n_inner']!r} is not supported; it must be null or 4 * n_embd = {4 * n_embd}"
        )
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"{source}: activation_function = {activation!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    ours = read_ours(values, source)
    return ModelConfig(
        n_layer=whole(values, "n_layer", 12, source),
        n_head=whole(values, "n_head", 12, source),
        n_embd=n_embd,
        block_size=whole(values, "n_positions", 1024, source),
        vocab_size=whole(values, "vocab_size", 50257, source),
        dropout=_dropout(values, ours, source),
        bias=ours.get("bias", True),
        gelu="tanh" if _ACTIVATIONS[activation] == "tanh" else "erf",
        # Padding is the one size that no tensor in the file confirms, so it is kept small.
        vocab_multiple=whole(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
    )


def _dropout(values: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> float:
    """Our one dropout, or the one value that GPT-2's three places share (0.1 where the file is silent)."""
    found = {"bardling.dropout": ours["dropout"]} if "dropout" in ours else {key: values.get(key, 0.1) for key in _DROPOUTS}
    for key, value in found.items():
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise UserError(f"{source}: {key} = {value!r}: must be a number of at least 0 and below 1")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{key} = {value}" for key, value in found.items())
        raise UserError(f"{source}: {listed}: different dropouts are not supported; give the three the same value")
    return float(next(iter(found.values())))


# ---- tensors ----


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `config` in Hugging Face's layout; GPT-2's biases are there whatever `config.bias`
    says."""
    ours, shapes = parameter_shapes(config), {}
    for name, parts in tensor_parts(config).items():
        for part in parts:
            shape = (part.stop - part.start, *ours[name][1:])
            shapes[part.name] = shape[::-1] if part.transposed else shape
            if layout_of(config) == "gpt2" and _has_bias(name):
                shapes[_bias_of(name)] = ours[name][:1]
    return shapes


def hf_state(state: Mapping[str, Tensor], config: ModelConfig, *, fill_biases: bool = True) -> dict[str, Tensor]:
    """Our tensors by parameter name (weights, gradients or moments) in Hugging Face's layout: contiguous, not padded.

    With `fill_biases` a GPT-2 without biases gets zeros for them, which Hugging Face's needs; the function it computes stays
    the same. There is no `lm_head.weight` where it is tied.
    """
    parts = tensor_parts(config)
    converted = {part.name: _cut(tensor, part) for name, tensor in state.items() for part in parts[name]}
    if fill_biases and not config.architecture.bias:
        for name, shape in hf_shapes(config).items():
            if name not in converted:
                converted[name] = torch.zeros(shape, dtype=state[EMBEDDING].dtype, device=state[EMBEDDING].device)
    return converted


def _cut(tensor: Tensor, part: Part) -> Tensor:
    rows = tensor[part.start : part.stop]
    return (rows.t() if part.transposed else rows).contiguous()


def _joined(tensors: Mapping[str, Tensor], parts: tuple[Part, ...], rows: int) -> Tensor:
    """The inverse of `_cut` for all parts of a parameter; padded rows are zero."""
    found = [tensors[part.name].t() if part.transposed else tensors[part.name] for part in parts]
    if rows > parts[-1].stop:
        found.append(found[0].new_zeros(rows - parts[-1].stop, *found[0].shape[1:]))
    return found[0].contiguous() if len(found) == 1 else torch.cat(found)


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig, source: str = "the weights") -> dict[str, Tensor]:
    """Our state dict from tensors in Hugging Face's layout, with or without the prefix `transformer.`. `source` names them in
    errors.

    Old causal-mask buffers, and a head equal to the embedding, are dropped; so are the biases of a model without them, if zero.

    Raises:
        UserError: a tensor is missing, not known, of another shape, an untied head, or a bias that is not zero.
    """
    named = {_full_name(name, config): tensor for name, tensor in state.items()}
    check_hf_shapes({name: tuple(tensor.shape) for name, tensor in named.items()}, config, source)
    parts = tensor_parts(config)
    (embedding,) = parts[EMBEDDING]
    if HEAD in named and HEAD not in parts and not torch.equal(named[HEAD], named[embedding.name]):
        raise UserError(f"{source}: {HEAD} differs from {embedding.name}: an untied head, but the configuration ties it")
    wanted = {part.name for group in parts.values() for part in group}
    for name, tensor in named.items():
        extra = name not in wanted and name != HEAD and not _BUFFER.fullmatch(name)
        if extra and bool(torch.any(tensor != 0)):
            raise UserError(f"{source}: {name} is not zero, but model.bias = False: use a configuration with biases")
    return {name: _joined(named, parts[name], shape[0]) for name, shape in parameter_shapes(config).items()}


def check_hf_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Compare the tensors a file offers (by full name) with what `config` needs. Takes no memory that the file does not pay
    for.

    Raises:
        UserError: a tensor is missing, not known, or of another shape.
    """
    layers = {int(match[1]) for match in map(_LAYER.match, shapes) if match}
    if len(layers) != config.n_layer:
        raise UserError(f"{source}: holds {len(layers)} layers, but the configuration says n_layer = {config.n_layer}")
    expected, parts = hf_shapes(config), tensor_parts(config)
    for part in (part for group in parts.values() for part in group):
        if part.name not in shapes:
            raise UserError(f"{source}: {part.name} is missing: the file is incomplete or of another architecture")
    (embedding,) = parts[EMBEDDING]
    for name, shape in shapes.items():
        if _BUFFER.fullmatch(name):
            continue
        want = expected.get(embedding.name if name == HEAD else name)
        if want is None:
            raise UserError(f"{source}: {name} is not a part of {_TITLES[layout_of(config)]}")
        if shape != want:
            raise UserError(f"{source}: {name} has shape {list(shape)}, but the configuration needs {list(want)}")


def _full_name(name: str, config: ModelConfig) -> str:
    prefix = _PREFIXES[layout_of(config)]
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def _has_bias(name: str) -> bool:
    return name.endswith(".weight") and not name.endswith((".wte.weight", ".wpe.weight"))


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


# ---- folders ----


def load_hf_folder(folder: str | Path, *, check_finite: bool = True) -> GPT:
    """A model from a folder with `config.json` and `model.safetensors` (or its shards and their index), float32 on the CPU.

    Raises:
        UserError: a file is missing, damaged, or not what the configuration describes; there are only pickled weights; with
            `check_finite`, a weight is NaN or infinite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = model_config_from_hf(_read_json(path), str(path))
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in files.items():
        shapes |= {_full_name(name, config): shape for name, shape in _read_shapes(file, names).items()}
    check_hf_shapes(shapes, config, str(folder))
    state = {name: tensor for file, names in files.items() for name, tensor in _read_tensors(file, names)}
    if check_finite:
        refuse_diverged(state, folder)
    with torch.device("meta"):
        model = GPT(config, seed=None)
    model.load_state_dict(from_hf_state(state, config, str(folder)), assign=True)
    return model


def refuse_diverged(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights that are no numbers.

    Raises:
        UserError: one is NaN or infinite; the message names `where` and the tensor.
    """
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds NaN or infinite numbers: the model is damaged")


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files with weights, and which tensors to take from each (None: all)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder / pickled[0]}: pickled weights can run code when read and are refused: "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{folder}: there is no model.safetensors here")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must be an object that names each tensor's file")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or not file.endswith(".safetensors")
            or len(file) > 200
        ):
            raise UserError(f"{index}: {file!r} is not the name of a .safetensors file beside it")
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; the folder is not a Hugging Face model")
    if path.stat().st_size > _MAX_JSON:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for such a file")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def _opened(path: Path, names: Iterable[str] | None, read: Callable[[Any, str], _T]) -> dict[str, _T]:
    """`read(file, name)` for each name (all of the file's when None)."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: the model is incomplete")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            known = set(file.keys())
            missing = [name for name in names or () if name not in known]
            if missing:
                raise UserError(f"{path}: {missing[0]} is missing: the file is not the one that its index describes")
            return {name: read(file, name) for name in (sorted(known) if names is None else names)}
    except (OSError, MemoryError) as error:  # a file larger than the address space cannot be mapped
        raise UserError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: is not a sound safetensors file ({error})") from error


def _read_shapes(path: Path, names: list[str] | None) -> dict[str, tuple[int, ...]]:
    def read(file: Any, name: str) -> tuple[int, ...]:
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES and not _is_buffer(name):
            raise UserError(f"{path}: {name} is of type {part.get_dtype()}; weights must be {', '.join(_DTYPES)}")
        return tuple(part.get_shape())

    return _opened(path, names, read)


def _is_buffer(name: str) -> bool:
    return any(_BUFFER.fullmatch(prefix + name) for prefix in ("", "transformer.", "model."))


def _read_tensors(path: Path, names: list[str] | None) -> Iterable[tuple[str, Tensor]]:
    def read(file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(torch.float32, copy=True)  # a copy, because the file may change under a mapped tensor

    return _opened(path, names, read).items()
