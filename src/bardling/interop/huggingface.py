"""Hugging Face's GPT-2 format: `config.json` and `model.safetensors`, as `transformers` writes and opens them.

Our parameter names are already those of `GPT2LMHeadModel`. What differs: its four linear layers of a block keep their matrices
[in, out] where ours are [out, in]; its vocabulary is not padded; it always has biases. Per-tensor functions (`to_hf`,
`from_hf`) do the conversion for weights and for an optimizer's moments alike. All of it is exact: a round trip gives back the
same bits.

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
from bardling.model.gpt import GPT

METADATA = {"format": "pt"}
"""What `transformers` looks for in the metadata of a safetensors file."""

_PREFIX = "transformer."
_TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files carry
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
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
    """The `config.json` of `config`, for `GPT2LMHeadModel`; `eot_id` is the token that ends a text, if there is one."""
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
        "bardling": {"bias": config.bias, "dropout": config.dropout, "vocab_multiple": config.vocab_multiple},
    }


def model_config_from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes. `source` names it in errors.

    Raises:
        UserError: not a GPT-2, a value of the wrong kind, or a setting that our GPT-2 does not have.
    """
    if values.get("model_type") != "gpt2":
        raise UserError(f"{source}: model_type = {values.get('model_type')!r}: only 'gpt2' models are supported")
    for key, allowed in _FIXED.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{source}: {key} = {values[key]!r} is not supported; it must be {allowed[0]!r}")
    n_embd = _integer(values, "n_embd", 768, source)
    if values.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(
            f"{source}: n_inner = {values['n_inner']!r} is not supported; it must be null or 4 * n_embd = {4 * n_embd}"
        )
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"{source}: activation_function = {activation!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    ours = values.get("bardling", {})
    if not isinstance(ours, Mapping) or not isinstance(ours.get("bias", True), bool):
        raise UserError(f"{source}: bardling = {ours!r}: must be an object whose 'bias' is true or false")
    return ModelConfig(
        n_layer=_integer(values, "n_layer", 12, source),
        n_head=_integer(values, "n_head", 12, source),
        n_embd=n_embd,
        block_size=_integer(values, "n_positions", 1024, source),
        vocab_size=_integer(values, "vocab_size", 50257, source),
        dropout=_dropout(values, ours, source),
        bias=ours.get("bias", True),
        gelu="tanh" if _ACTIVATIONS[activation] == "tanh" else "erf",
        # Padding is the one size that no tensor in the file confirms, so it is kept small.
        vocab_multiple=_integer(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
    )


def _integer(values: Mapping[str, Any], key: str, default: int, source: str, *, limit: int = 2**31 - 1) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{source}: {key} = {value!r}: must be a whole number from 1 to {limit}")
    return value


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


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `GPT(config)`'s parameters, without building one."""
    width = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.padded_vocab_size, width),
        "transformer.wpe.weight": (config.block_size, width),
    }
    block = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
    block |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    modules: dict[str, tuple[int, ...]] = {}
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}."
        modules |= {f"{prefix}ln_1": (width,), f"{prefix}ln_2": (width,)}
        modules |= {prefix + name: shape for name, shape in block.items()}
    modules["transformer.ln_f"] = (width,)
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `config` in Hugging Face's layout; biases are there whatever `config.bias` says."""
    shapes = parameter_shapes(config)
    shapes |= {_bias_of(name): shape[:1] for name, shape in shapes.items() if _has_bias(name)}
    shapes = {name: shape[::-1] if name.endswith(_TRANSPOSED) else shape for name, shape in shapes.items()}
    return shapes | {_EMBEDDING: (config.vocab_size, config.n_embd)}


def to_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One of our parameters, or its gradient or moment, in Hugging Face's layout: contiguous, not padded."""
    if name.endswith(_TRANSPOSED):
        return tensor.t().contiguous()
    return tensor[: config.vocab_size].contiguous() if name == _EMBEDDING else tensor.contiguous()


def from_hf(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `to_hf`: padded rows are zero."""
    if name.endswith(_TRANSPOSED):
        return tensor.t().contiguous()
    if name == _EMBEDDING and config.padded_vocab_size > config.vocab_size:
        return torch.cat([tensor, tensor.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)])
    return tensor.contiguous()


def hf_state(state: Mapping[str, Tensor], config: ModelConfig, *, fill_biases: bool = True) -> dict[str, Tensor]:
    """Our tensors by parameter name (weights, gradients or moments) in Hugging Face's layout.

    With `fill_biases` a model without biases gets zeros for them, which Hugging Face's GPT-2 needs; the function it computes
    stays the same. There is no `lm_head.weight`: it is tied.
    """
    converted = {name: to_hf(name, tensor, config) for name, tensor in state.items()}
    if fill_biases and not config.bias:
        for name, shape in hf_shapes(config).items():
            if name not in converted:
                converted[name] = torch.zeros(shape, dtype=state[_EMBEDDING].dtype, device=state[_EMBEDDING].device)
    return converted


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig, source: str = "the weights") -> dict[str, Tensor]:
    """Our state dict from tensors in Hugging Face's layout, with or without the prefix `transformer.`. `source` names them in
    errors.

    Old causal-mask buffers, and a head equal to the embedding, are dropped; so are the biases of a model without them, if zero.

    Raises:
        UserError: a tensor is missing, not known, of another shape, an untied head, or a bias that is not zero.
    """
    named = {_full_name(name): tensor for name, tensor in state.items()}
    check_hf_shapes({name: tuple(tensor.shape) for name, tensor in named.items()}, config, source)
    if _HEAD in named and not torch.equal(named[_HEAD], named[_EMBEDDING]):
        raise UserError(f"{source}: {_HEAD} differs from {_EMBEDDING}: models with an untied head are not supported")
    wanted = parameter_shapes(config)
    for name, tensor in named.items():
        extra = name not in wanted and name != _HEAD and not _BUFFER.fullmatch(name)
        if extra and bool(torch.any(tensor != 0)):
            raise UserError(f"{source}: {name} is not zero, but model.bias = False: use a configuration with biases")
    return {name: from_hf(name, named[name], config) for name in wanted}


def check_hf_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Compare the tensors a file offers (by full name) with what `config` needs. Takes no memory that the file does not pay
    for.

    Raises:
        UserError: a tensor is missing, not known, or of another shape.
    """
    layers = {int(match[1]) for match in map(_LAYER.match, shapes) if match}
    if len(layers) != config.n_layer:
        raise UserError(f"{source}: holds {len(layers)} layers, but the configuration says n_layer = {config.n_layer}")
    expected = hf_shapes(config)
    for name in parameter_shapes(config):
        if name not in shapes:
            raise UserError(f"{source}: {name} is missing: the file is incomplete or not a GPT-2")
    for name, shape in shapes.items():
        if _BUFFER.fullmatch(name):
            continue
        want = expected.get(_EMBEDDING if name == _HEAD else name)
        if want is None:
            raise UserError(f"{source}: {name} is not a part of GPT-2")
        if shape != want:
            raise UserError(f"{source}: {name} has shape {list(shape)}, but the configuration needs {list(want)}")


def _full_name(name: str) -> str:
    return name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name


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
        shapes |= {_full_name(name): shape for name, shape in _read_shapes(file, names).items()}
    check_hf_shapes(shapes, config, str(folder))
    state = {name: tensor for file, names in files.items() for name, tensor in _read_tensors(file, names)}
    if check_finite:
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{folder}: {name} holds NaN or infinite numbers: the model is damaged")
    with torch.device("meta"):
        model = GPT(config, seed=None)
    model.load_state_dict(from_hf_state(state, config, str(folder)), assign=True)
    return model


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
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
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
    except SafetensorError as error:
        raise UserError(f"{path}: is not a sound safetensors file ({error})") from error


def _read_shapes(path: Path, names: list[str] | None) -> dict[str, tuple[int, ...]]:
    def read(file: Any, name: str) -> tuple[int, ...]:
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES and not _BUFFER.fullmatch(_full_name(name)):
            raise UserError(f"{path}: {name} is of type {part.get_dtype()}; weights must be {', '.join(_DTYPES)}")
        return tuple(part.get_shape())

    return _opened(path, names, read)


def _read_tensors(path: Path, names: list[str] | None) -> Iterable[tuple[str, Tensor]]:
    def read(file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor.to(torch.float32, copy=True)  # a copy, because the file may change under a mapped tensor

    return _opened(path, names, read).items()
