"""How `transformers` names and lays out each family's tensors, and its configurations of Llama and Qwen3.

A layout lists, for each of our parameters, the tensors that hold its rows, in order, without the rows that pad the vocabulary.
GPT-2 uses our names and stores the matrices of a block's linear layers transposed, [in, out]. Llama and Qwen3 have separate
matrices where ours are fused. A model that `transformers` does not implement keeps our names ("bardling"). Configurations are
untrusted: a setting that would change the computed function is refused by name unless it is implemented here.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from bardling.config import ModelConfig
from bardling.config.model import MAX_LAYERS
from bardling.config.recipes import config_from_dict, config_to_dict
from bardling.errors import UserError
from bardling.model.init import has_vocabulary_rows
from bardling.planning.parameter_shapes import EMBEDDING, HEAD, matrix_rows, parameter_shapes

Layout = Literal["gpt2", "llama", "qwen3", "bardling"]

BARDLING = "bardling"
"""The `model_type` of models that `transformers` does not implement, and the `config.json` key for settings it lacks."""

_TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_RENAMED = {  # Llama's and Qwen3's names; those of a block without the block's prefix
    EMBEDDING: ("model.embed_tokens.weight",),
    HEAD: (HEAD,),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "ln_1.weight": ("input_layernorm.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "attn.ln_q.weight": ("self_attn.q_norm.weight",),
    "attn.ln_k.weight": ("self_attn.k_norm.weight",),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
_FIXED: dict[str, tuple[object, ...]] = {  # settings not implemented here, and their only supported values
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}
_FIXED_IN_ALL: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
}
_UNSCALED: dict[str, tuple[object, ...]] = {  # what unscaled RoPE may state besides its base
    "rope_type": ("default", "linear"),
    "type": ("default", "linear"),
    "factor": (1.0, None),
    "partial_rotary_factor": (1.0, None),
}
_RMS_EPS, _ROPE_THETA = 1e-6, 10_000.0  # the defaults of transformers


class Part(NamedTuple):
    """The rows of one of our parameters that another format stores as one tensor."""

    name: str  # in the other format
    start: int
    stop: int
    transposed: bool = False


def layout_of(config: ModelConfig) -> Layout:
    """The layout in which a model is written."""
    return config.architecture.transformers_family or "bardling"


def tensor_parts(config: ModelConfig, layout: Layout) -> dict[str, tuple[Part, ...]]:
    """For each of our parameters, the tensors that hold its rows, in order and without padding rows."""
    parts: dict[str, tuple[Part, ...]] = {}
    fused = {f"{layer}.weight": tuple(rows.values()) for layer, rows in matrix_rows(config).items()}
    for name, shape in parameter_shapes(config).items():
        rows = config.vocab_size if has_vocabulary_rows(name) else shape[0]
        if layout in ("gpt2", "bardling"):
            parts[name] = (Part(name, 0, rows, transposed=layout == "gpt2" and name.endswith(_TRANSPOSED)),)
            continue
        prefix, inner = "", name
        if name.startswith("transformer.h."):
            layer, inner = name.removeprefix("transformer.h.").split(".", 1)
            prefix = f"model.layers.{layer}."
        stops = list(itertools.accumulate(fused.get(inner, (rows,))))
        theirs = (prefix + renamed for renamed in _RENAMED[inner])
        parts[name] = tuple(map(Part, theirs, [0, *stops], stops))
    return parts


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model for `LlamaForCausalLM` or `Qwen3ForCausalLM`."""
    arch = config.architecture
    qwen = arch.transformers_family == "qwen3"
    values: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": arch.transformers_family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": arch.mlp_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": arch.n_head,
        "num_key_value_heads": arch.n_kv_head,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,  # for transformers 4 and llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": arch.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    if qwen:
        values |= {
            "use_sliding_window": arch.sliding_window is not None,
            "sliding_window": arch.sliding_window,
            "max_window_layers": 0 if arch.sliding_window is not None else config.n_layer,
            "layer_types": _layer_types(config),
        }
    else:
        values["mlp_bias"] = False
    keys = ("dropout", "vocab_multiple", "zero_init", "global_every")
    return {**values, BARDLING: {key: getattr(config, key) for key in keys}}


def _layer_types(config: ModelConfig) -> list[str]:
    windows = [config.architecture.window(layer) for layer in range(config.n_layer)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def model_config_from_llama(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The architecture described by the `config.json` of a Llama or Qwen3."""
    kind = values["model_type"]
    check_fixed(values, _FIXED, source)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key not in values:
            raise UserError(f"{source}: model_type = {kind!r} needs {key}, which is missing")
    ours = bardling_section(values, source)
    if (tied := values.get("tie_word_embeddings")) is None:
        tied = False
    if not isinstance(tied, bool) or not isinstance(ours.get("zero_init", False), bool):
        raise UserError(f"{source}: tie_word_embeddings = {tied!r}, and bardling.zero_init, must be true or false")
    options: dict[str, Any] = {
        "n_layer": positive_int(values, "num_hidden_layers", 0, source, limit=MAX_LAYERS),
        "n_head": positive_int(values, "num_attention_heads", 0, source),
        "n_embd": positive_int(values, "hidden_size", 0, source),
        "block_size": positive_int(values, "max_position_embeddings", 2048 if kind == "llama" else 32768, source),
        "vocab_size": positive_int(values, "vocab_size", 0, source),
        "dropout": dropout_rate("dropout", ours.get("dropout", values.get("attention_dropout") or 0.0), source),
        "vocab_multiple": positive_int(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
        "norm_eps": positive_number(values, "rms_norm_eps", _RMS_EPS, source),
        "rope_theta": _rope_theta(values, source),
        "mlp_hidden": positive_int(values, "intermediate_size", 0, source),
        "init_std": positive_number(values, "initializer_range", 0.02, source) if values.get("initializer_range") else 0.02,
    }
    if values.get("num_key_value_heads") is not None:
        options["n_kv_head"] = positive_int(values, "num_key_value_heads", 0, source)
    # If missing, transformers uses 128 channels per head for a Qwen3, and hidden_size / heads for a Llama.
    if values.get("head_dim") is not None or kind == "qwen3":
        options["head_dim"] = positive_int(values, "head_dim", 128, source)
    try:
        config = ModelConfig(family=kind, tied=tied, zero_init=ours.get("zero_init", False), **options)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return (_with_windows(config, values, ours, source) if kind == "qwen3" else config).resolved()


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """The RoPE base, from the keys of transformers 5 or those of transformers 4; scaled RoPE is refused."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: {key} = {shown(rope)}: must be an object")
    kinds = {rope[name] for name in ("rope_type", "type") if isinstance(rope.get(name), str)}
    plain = all(name == "rope_theta" or rope[name] in _UNSCALED.get(name, ()) for name in rope)
    if not plain or ("linear" in kinds and rope.get("factor") != 1.0):
        raise UserError(f"{source}: {key} = {shown(rope)} is not supported: only unscaled RoPE is")
    return positive_number(rope, "rope_theta", positive_number(values, "rope_theta", _ROPE_THETA, source), source)


def _with_windows(config: ModelConfig, values: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> ModelConfig:
    """`config` with Qwen3's sliding windows, if `global_every` can express their pattern."""
    used, types = values.get("use_sliding_window", False), values.get("layer_types")
    if used is True and values.get("sliding_window") is not None and types is None:
        first = values.get("max_window_layers", 28)
        if type(first) is not int:
            raise UserError(f"{source}: max_window_layers = {first!r}: must be an integer")
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(config.n_layer)]
    if types is None or types == ["full_attention"] * config.n_layer:
        return config
    if used is True and isinstance(types, list):
        window = positive_int(values, "sliding_window", 0, source)
        stored, found = ours.get("global_every"), types.index("full_attention") + 1 if "full_attention" in types else 0
        for every in (stored, found):
            if type(every) is int and every >= 0:
                windowed = dataclasses.replace(config, sliding_window=window, global_every=every)
                if _layer_types(windowed) == types:
                    return windowed
    rule = "must make every Nth layer full_attention and the others sliding_attention, with use_sliding_window"
    raise UserError(f"{source}: layer_types = {shown(types)}: {rule}")


def bardling_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model that `transformers` does not implement: all options by their names in a recipe."""
    values = config_to_dict(dataclasses.replace(config.resolved(), block_size=config.context, max_positions=None))
    del values["init"]
    note = f"{config.architecture.transformers_mismatch}; only bardling opens this model, transformers does not"
    return {"model_type": BARDLING, "note": note, "dtype": "float32", **values}


def model_config_from_bardling(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The inverse of `bardling_config`."""
    options = {key: value for key, value in values.items() if key not in ("model_type", "note", "dtype")}
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        positive_int(options, key, 0, source)
    return config_from_dict(ModelConfig, options, source)


def bardling_section(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Our section of a `transformers` configuration."""
    ours = values.get(BARDLING, {})
    if not isinstance(ours, Mapping) or not isinstance(ours.get("bias", True), bool):
        raise UserError(f"{source}: bardling = {ours!r}: must be an object whose 'bias' is true or false")
    return ours


def check_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[object, ...]], source: str) -> None:
    """Refuse settings whose value is not among the supported ones in `fixed`, or in `_FIXED_IN_ALL`."""
    for key, supported in {**fixed, **_FIXED_IN_ALL}.items():
        if key in values and values[key] not in supported:
            remedy = "save the model unquantized" if key == "quantization_config" else f"it must be {supported[0]!r}"
            raise UserError(f"{source}: {key} = {shown(values[key])} is not supported; {remedy}")


def shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def dropout_rate(key: str, value: object, source: str) -> float:
    """`value` as a dropout probability; `key` names it in errors."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UserError(f"{source}: {key} = {value!r}: must be a number from 0 to below 1")
    return float(value)


def positive_int(values: Mapping[str, Any], key: str, default: int, source: str, *, limit: int = 2**31 - 1) -> int:
    """An integer from 1 to `limit`."""
    value = values.get(key, default)
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{source}: {key} = {value!r}: must be an integer from 1 to {limit}")
    return value


def positive_number(values: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise UserError(f"{source}: {key} = {value!r}: must be a number above 0")
    return float(value)
