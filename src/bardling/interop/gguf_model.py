"""GPT-2, Llama and Qwen3 in GGUF: llama.cpp's names for the configuration and the tensors.

A model is converted to the Hugging Face layout of `interop/families.py` and from there to llama.cpp's: other names, GPT-2's
linear layers not transposed, and in a Llama the rows of queries and keys in the order of its RoPE, which rotates neighbouring
channels instead of the two halves of a head. Reading goes the same way back, through the same checks. A setting or tensor
that this package does not implement is refused by name. Settings that GGUF lacks (dropout, vocabulary padding) are one JSON
text under the key `bardling.model`, which llama.cpp ignores.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.files.reading import parse_json_object
from bardling.interop.families import BARDLING, layout_of, positive_int, positive_number, shown
from bardling.interop.gguf_file import GgufFile, read_gguf_tensors
from bardling.interop.huggingface import from_hf_state, hf_config, hf_state, model_config_from_hf, refuse_nonfinite

_OURS = "bardling.model"
_CONFIG = {  # the names of config.json: those of a GPT-2, then those of the others
    "context_length": ("n_positions", "max_position_embeddings"),
    "embedding_length": ("n_embd", "hidden_size"),
    "block_count": ("n_layer", "num_hidden_layers"),
    "feed_forward_length": ("n_inner", "intermediate_size"),
    "attention.head_count": ("n_head", "num_attention_heads"),
    "attention.head_count_kv": ("", "num_key_value_heads"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", ""),
    "attention.layer_norm_rms_epsilon": ("", "rms_norm_eps"),
    "attention.key_length": ("", "head_dim"),
    "rope.freq_base": ("", "rope_theta"),
    "vocab_size": ("vocab_size", "vocab_size"),
}
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")  # head_dim again
_TENSORS = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_LLAMA_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD = {"lm_head": "output"}
_THEIRS = re.compile(r"(?:(?:transformer\.h|model\.layers)\.(\d{1,4})\.)?(.+)\.(weight|bias)")
_GGUF = re.compile(r"(?:blk\.(\d{1,4})\.)?(.+)\.(weight|bias)")


def gguf_refusal(config: ModelConfig) -> str:
    """Why llama.cpp cannot run such a model; empty if it can."""
    arch = config.architecture
    options = [] if arch.sliding_window is None else [f"model.sliding_window = {arch.sliding_window}"]
    if arch.transformers_family == "gpt2" and config.gelu != "tanh":
        options.append(f"model.gelu = {config.gelu}")
    fault = arch.transformers_mismatch.replace("transformers", "llama.cpp")
    if options and not fault:
        fault = f"{', '.join(options)}: not supported by {arch.transformers_family} in llama.cpp"
    return f"cannot be exported as GGUF: {fault}" if fault else ""


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model that `gguf_refusal` accepts, without the tokenizer's."""
    values, arch = hf_config(config), config.architecture
    family, gpt2 = values["model_type"], values["model_type"] == "gpt2"
    values["n_inner"] = arch.mlp_hidden
    found = {key: values[names[not gpt2]] for key, names in _CONFIG.items() if names[not gpt2]}
    if not gpt2:
        found |= dict.fromkeys(_SAME_AS_HEAD, arch.head_dim)
    ours = {**values[BARDLING], "init_std": config.init_std}
    return {"general.type": "model", **{f"{family}.{key}": value for key, value in found.items()}, _OURS: json.dumps(ours)}


def gguf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of `GPT.state_dict()` by llama.cpp's names, without the rows that pad the vocabulary."""
    kind, result = layout_of(config), dict[str, Tensor]()
    names = _names(kind)
    for name, tensor in hf_state(state, config).items():
        match = _THEIRS.fullmatch(name)
        assert match is not None
        layer, inner, end = match.groups()
        prefix = "" if layer is None else f"blk.{layer}."
        result[f"{prefix}{names[inner]}.{end}"] = _converted(names[inner], tensor, config, kind, back=False)
    return result


def read_gguf_model(header: GgufFile) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and our state dict, float32 on the CPU, of a file that `read_header` has read."""
    path, kind = header.path, header.metadata.get("general.architecture")
    if kind not in ("gpt2", "llama", "qwen3"):
        raise UserError(f"{path}: general.architecture = {shown(kind)}: only 'gpt2', 'llama' and 'qwen3' are supported")
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise UserError(f"{path}: is one of {shown(parts)} files of a model: join them with llama-gguf-split --merge")
    places = header.tensors
    if "token_embd.weight" not in places:
        raise UserError(f"{path}: token_embd.weight is missing: the file holds no model")
    tied = "output.weight" not in places
    config = _config(path, kind, header.metadata, vocab_size=places["token_embd.weight"].shape[0], tied=tied)
    renamed = {name: _their_name(path, name, kind) for name in places}
    tensors = read_gguf_tensors(header)
    if not tied and kind == "gpt2" and torch.equal(tensors["output.weight"], tensors["token_embd.weight"]):
        config = _config(path, kind, header.metadata, vocab_size=config.vocab_size, tied=True)  # as llama.cpp writes a GPT-2
    refuse_nonfinite(tensors, path)
    state = {renamed[name]: _converted(_base(name), tensors.pop(name), config, kind, back=True) for name in list(tensors)}
    return config, dict(from_hf_state(state, config, str(path), kind))


def _config(path: Path, kind: str, metadata: Mapping[str, Any], *, vocab_size: int, tied: bool) -> ModelConfig:
    """The configuration, through the names and the checks of `config.json`."""
    found = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    gpt2 = kind == "gpt2"
    names = {key: names[not gpt2] for key, names in _CONFIG.items() if names[not gpt2]}
    found = {key: value for key, value in found.items() if (key, value) != ("rope.scaling.type", "none")}
    if unknown := sorted(key for key in found if key not in names and (gpt2 or key not in _SAME_AS_HEAD)):
        raise UserError(f"{path}: {kind}.{unknown[0]} = {shown(found[unknown[0]])} is not supported")
    missing = {"embedding_length", "block_count", "attention.head_count", "context_length"} - found.keys()
    if missing:
        raise UserError(f"{path}: {kind}.{min(missing)} is missing: the file is damaged or of another architecture")
    for key in found:
        check: Any = positive_number if key.endswith(("_epsilon", "freq_base")) else positive_int
        check(found, key, 0, f"{path}: {kind}")
    values = {"model_type": kind, **{names[key]: value for key, value in found.items() if key in names}}
    text = metadata.get(_OURS, "{}")
    if not isinstance(text, str):
        raise UserError(f"{path}: {_OURS} = {shown(text)}: must be text")
    ours = {"dropout": 0.0, **parse_json_object(text.encode(), f"{path}: {_OURS}")}
    values |= {"vocab_size": vocab_size, "tie_word_embeddings": tied, BARDLING: ours, "activation_function": "gelu_new"}
    values |= {"initializer_range": ours.get("init_std", 0.02)}
    if not gpt2 and "head_dim" not in values:  # llama.cpp's default, also for Qwen3
        values["head_dim"] = found["embedding_length"] // found["attention.head_count"]
    for key in _SAME_AS_HEAD:
        if key in found and found[key] != values["head_dim"]:
            raise UserError(
                f"{path}: {kind}.{key} = {shown(found[key])}: only {values['head_dim']}, the size of a head, is supported"
            )
    return model_config_from_hf(values, str(path))


def _names(kind: str) -> dict[str, str]:
    return {**(_TENSORS if kind == "gpt2" else _LLAMA_TENSORS), **_HEAD}


def _base(name: str) -> str:
    match = _GGUF.fullmatch(name)
    return match[2] if match else ""


def _their_name(path: Path, name: str, kind: str) -> str:
    """The name of a tensor in `transformers`."""
    theirs, match = {new: old for old, new in _names(kind).items()}, _GGUF.fullmatch(name)
    inner = theirs.get(match[2]) if match else None
    if match is None or inner is None:
        what = ", which scales RoPE," if name == "rope_freqs.weight" else ""
        raise UserError(f"{path}: the tensor {shown(name)}{what} is not supported in a {kind}")
    block = "transformer.h" if kind == "gpt2" else "model.layers"
    return f"{'' if match[1] is None else f'{block}.{match[1]}.'}{inner}.{match[3]}"


def _converted(name: str, tensor: Tensor, config: ModelConfig, kind: str, *, back: bool) -> Tensor:
    """A tensor with llama.cpp's `name` (without 'weight') in the other layout."""
    arch = config.architecture
    if kind == "gpt2":
        linear = name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and tensor.ndim == 2
        return tensor.t().contiguous() if linear else tensor
    heads = {"attn_q": arch.n_head, "attn_k": arch.n_kv_head}.get(name)
    if kind != "llama" or heads is None or tensor.size(0) % (2 * heads):
        return tensor
    pairs = (heads, -1, 2) if back else (heads, 2, tensor.size(0) // heads // 2)
    return tensor.reshape(*pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
