"""How `transformers` names and lays out each family's tensors, and its configurations of Llama and Qwen3.

Every layout is a table: for each of our parameters, the tensors that hold its rows, in order. GPT-2's has our names and, for
the linear layers of a block, matrices turned [in, out]. Llama's and Qwen3's have one matrix each for queries, keys, values,
gate and what it gates, where ours are fused. A model that no family of `transformers` computes keeps our names ("bardling").
Rows that pad the vocabulary are in none of them.

Configurations come from strangers: settings that would change the function computed are compared with what is implemented here,
one by one, and refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from bardling.config import ModelConfig
from bardling.configfile import config_from_dict, config_to_dict
from bardling.errors import UserError
from bardling.interop.shapes import EMBEDDING, HEAD, parameter_shapes
from bardling.model.init import has_vocabulary_rows

Layout = Literal["gpt2", "llama", "qwen3", "bardling"]

OWN = "bardling"
"""`model_type` of what `transformers` does not know, and the key under which a configuration keeps what it cannot say."""

_TRANSPOSED = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_RENAMED = {
    EMBEDDING: "model.embed_tokens.weight",
    HEAD: HEAD,
    "transformer.ln_f.weight": "model.norm.weight",
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "attn.ln_q.weight": "self_attn.q_norm.weight",
    "attn.ln_k.weight": "self_attn.k_norm.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_FIXED: dict[str, tuple[object, ...]] = {  # settings with one meaning here, and the values that mean it
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1.0),
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}
_MOST_LAYERS = 1 << 16  # lists of layers are made of this number before a file confirms it
_RMS_EPS, _ROPE_THETA = 1e-6, 10_000.0  # what transformers takes where a file is silent


class Part(NamedTuple):
    """Rows of one of our parameters as another format keeps them."""

    name: str  # the other format's
    start: int
    stop: int
    transposed: bool = False


def layout_of(config: ModelConfig) -> Layout:
    """The format in which a model's files are written."""
    return config.architecture.opens_as or "bardling"


def tensor_parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """For each of our parameters the tensors that hold it, first rows first; the padding's rows are left out."""
    layout, parts = layout_of(config), {}
    for name, shape in parameter_shapes(config).items():
        rows = config.vocab_size if has_vocabulary_rows(name) else shape[0]
        if layout in ("llama", "qwen3"):
            parts[name] = _split(name, rows, config)
        else:
            parts[name] = (Part(name, 0, rows, transposed=layout == "gpt2" and name.endswith(_TRANSPOSED)),)
    return parts


def _split(name: str, rows: int, config: ModelConfig) -> tuple[Part, ...]:
    if not name.startswith("transformer.h."):
        return (Part(_RENAMED[name], 0, rows),)
    layer, inner = name.removeprefix("transformer.h.").split(".", 1)
    made, prefix = config.architecture, f"model.layers.{layer}."
    if inner == "attn.c_attn.weight":
        names = [f"self_attn.{letter}_proj.weight" for letter in "qkv"]
        return _in_a_row(prefix, names, [made.query_width, made.kv_width, made.kv_width])
    if inner == "mlp.c_fc.weight":
        return _in_a_row(prefix, ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [made.mlp_hidden] * 2)
    return (Part(prefix + _RENAMED[inner], 0, rows),)


def _in_a_row(prefix: str, names: list[str], rows: list[int]) -> tuple[Part, ...]:
    parts, start = [], 0
    for name, count in zip(names, rows, strict=True):
        parts.append(Part(prefix + name, start, start + count))
        start += count
    return tuple(parts)


# ---- configurations ----


def rotary_config(config: ModelConfig, *, eot_id: int | None) -> dict[str, Any]:
    """The `config.json` of a model that `LlamaForCausalLM` or `Qwen3ForCausalLM` computes."""
    made = config.architecture
    qwen = made.opens_as == "qwen3"
    values: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": made.opens_as,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": made.mlp_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": made.n_head,
        "num_key_value_heads": made.n_kv_head,
        "head_dim": made.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "initializer_range": config.init_std,
        "rms_norm_eps": made.norm_eps,
        "rope_theta": made.rope_theta,  # where transformers 4 and llama.cpp look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": made.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": made.tied,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
    }
    if qwen:
        values |= {
            "use_sliding_window": made.sliding_window is not None,
            "sliding_window": made.sliding_window,
            "max_window_layers": 0 if made.sliding_window is not None else config.n_layer,
            "layer_types": _layer_types(config),
        }
    else:
        values["mlp_bias"] = False
    keys = ("dropout", "vocab_multiple", "zero_init", "global_every")
    return {**values, OWN: {key: getattr(config, key) for key in keys}}


def _layer_types(config: ModelConfig) -> list[str]:
    windows = [config.architecture.window(layer) for layer in range(config.n_layer)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def rotary_model_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The architecture that a `config.json` of a Llama or a Qwen3 describes.

    Raises:
        UserError: a value of the wrong kind, or a setting that is not implemented here.
    """
    kind = values["model_type"]
    assert kind in ("llama", "qwen3")
    for key, allowed in _FIXED.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{source}: {key} = {values[key]!r} is not supported; it must be {allowed[0]!r}")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key not in values:
            raise UserError(f"{source}: model_type = {kind!r} needs {key}, which is missing")
    ours = read_ours(values, source)
    n_embd, n_head = whole(values, "hidden_size", 0, source), whole(values, "num_attention_heads", 0, source)
    n_layer = whole(values, "num_hidden_layers", 0, source, limit=_MOST_LAYERS)
    # transformers takes 128 channels a head for a Qwen3 that does not say, and hidden_size / heads for a Llama.
    head_dim = None if values.get("head_dim") is None and kind == "llama" else whole(values, "head_dim", 128, source)
    kv_heads = None if values.get("num_key_value_heads") is None else whole(values, "num_key_value_heads", 0, source)
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool) or not isinstance(ours.get("zero_init", False), bool):
        raise UserError(f"{source}: tie_word_embeddings = {tied!r}, and bardling.zero_init, must be true or false")
    dropout = ours.get("dropout", values.get("attention_dropout", 0.0))
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{source}: dropout = {dropout!r}: must be a number of at least 0 and below 1")
    try:
        config = ModelConfig(
            family="qwen3" if kind == "qwen3" else "llama",
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=whole(values, "max_position_embeddings", 2048 if kind == "llama" else 32768, source),
            vocab_size=whole(values, "vocab_size", 0, source),
            dropout=float(dropout),
            vocab_multiple=whole(ours, "vocab_multiple", ModelConfig.vocab_multiple, source, limit=4096),
            norm_eps=_positive(values, "rms_norm_eps", _RMS_EPS, source),
            rope_theta=_rope_theta(values, source),
            n_kv_head=kv_heads,
            head_dim=head_dim,
            mlp_hidden=whole(values, "intermediate_size", 0, source),
            tied=tied,
            zero_init=ours.get("zero_init", False),
            init_std=_positive(values, "initializer_range", 0.02, source),
        )
    except UserError as error:
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None
    return (_windows(config, values, ours, source) if kind == "qwen3" else config).resolved()


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """The base of the wavelengths, from where transformers 5 keeps it or where 4 did."""
    rope = values.get("rope_parameters")
    if rope is None:
        return _positive(values, "rope_theta", _ROPE_THETA, source)
    plain = isinstance(rope, Mapping) and rope.get("rope_type", "default") == rope.get("type", "default") == "default"
    if not isinstance(rope, Mapping) or not plain or set(rope) - _ROPE_KEYS:
        raise UserError(f"{source}: rope_parameters = {rope!r} is not supported; only unscaled rotary positions are")
    return _positive(rope, "rope_theta", _positive(values, "rope_theta", _ROPE_THETA, source), source)


def _windows(config: ModelConfig, values: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> ModelConfig:
    """Qwen3's sliding windows, where they follow a pattern that `global_every` can say."""
    used, types = values.get("use_sliding_window", False), values.get("layer_types")
    if used is True and values.get("sliding_window") is not None and types is None:
        first = values.get("max_window_layers", 28)
        if type(first) is not int:
            raise UserError(f"{source}: max_window_layers = {first!r}: must be a whole number")
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(config.n_layer)]
    if types is None or types == ["full_attention"] * config.n_layer:
        return config
    if used is True and isinstance(types, list):
        window = whole(values, "sliding_window", 0, source)
        told, found = ours.get("global_every"), types.index("full_attention") + 1 if "full_attention" in types else 0
        for every in (told, found):
            if type(every) is int and every >= 0:
                windowed = dataclasses.replace(config, sliding_window=window, global_every=every)
                if _layer_types(windowed) == types:
                    return windowed
    raise UserError(f"{source}: layer_types do not make every n-th layer full_attention and the rest sliding_attention")


def own_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model that `transformers` does not know: every option by the name it has in a recipe."""
    values = config_to_dict(config.resolved())
    del values["init"]
    note = f"{config.architecture.why_not}; bardling opens this model, transformers does not"
    return {"model_type": OWN, "note": note, "dtype": "float32", **values}


def own_model_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The inverse of `own_config`.

    Raises:
        UserError: an unknown key, or a value of the wrong kind or size.
    """
    options = {key: value for key, value in values.items() if key not in ("model_type", "note", "dtype")}
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        whole(options, key, 0, source)
    return config_from_dict(ModelConfig, options, source)


# ---- values ----


def read_ours(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """What a configuration of `transformers` keeps for us."""
    ours = values.get(OWN, {})
    if not isinstance(ours, Mapping) or not isinstance(ours.get("bias", True), bool):
        raise UserError(f"{source}: bardling = {ours!r}: must be an object whose 'bias' is true or false")
    return ours


def whole(values: Mapping[str, Any], key: str, default: int, source: str, *, limit: int = 2**31 - 1) -> int:
    """A whole number from 1 to `limit`."""
    value = values.get(key, default)
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{source}: {key} = {value!r}: must be a whole number from 1 to {limit}")
    return value


def _positive(values: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise UserError(f"{source}: {key} = {value!r}: must be a number above 0")
    return float(value)
