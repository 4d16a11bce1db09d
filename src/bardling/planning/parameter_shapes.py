"""Names, shapes and kinds of a model's parameters, from its configuration alone."""

import re
from typing import Literal

from bardling.config import ModelConfig

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"

Kind = Literal["embedding", "head", "vector", "matrix", "other"]

_BLOCK = re.compile(r"(^|\.)h\.\d+\.")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|wve)\.([\w.]+\.)?weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `GPT(config)`'s parameters, without building one; a GPT-2's in the order of `named_parameters`."""
    arch, width, rows = config.architecture, config.n_embd, config.padded_vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, width)}
    if arch.positions == "learned":
        shapes["transformer.wpe.weight"] = (config.block_size, width)
    for table in range(arch.value_embeddings):
        shapes[f"transformer.wve.{table}.weight"] = (rows, arch.kv_width)
    for layer in range(config.n_layer):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in _block(config, layer).items()}
    shapes |= _with_bias("transformer.ln_f", (width,), bias=arch.bias and arch.norm == "layernorm")
    if not arch.tied:
        shapes[HEAD] = (rows, width)
    return shapes


def _block(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    arch, width = config.architecture, config.n_embd
    norm_bias = arch.bias and arch.norm == "layernorm"
    attention, mlp = _with_bias("ln_1", (width,), bias=norm_bias), _with_bias("ln_2", (width,), bias=norm_bias)
    for name, (inputs, outputs) in block_matrices(config).items():
        part = attention if name.startswith("attn.") else mlp
        part |= _with_bias(name, (outputs, inputs), bias=arch.bias)
    if arch.qk_norm == "weight":
        attention |= {"attn.ln_q.weight": (arch.head_dim,), "attn.ln_k.weight": (arch.head_dim,)}
    if arch.value_table(layer) is not None:
        attention["attn.value_mix"] = (2,)
    return attention | mlp


def block_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Linear layers of a block: name -> (inputs, outputs)."""
    arch, c = config.architecture, config.n_embd
    return {
        "attn.c_attn": (c, arch.query_width + 2 * arch.kv_width),
        "attn.c_proj": (arch.query_width, c),
        "mlp.c_fc": (c, arch.fc_width),
        "mlp.c_proj": (arch.mlp_hidden, c),
    }


def _with_bias(name: str, shape: tuple[int, ...], *, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": shape}
    return shapes | {f"{name}.bias": shape[:1]} if bias else shapes


def parameter_kind(name: str, dimensions: int) -> Kind:
    """The kind of a parameter; Muon updates those of kind 'matrix'."""
    if _EMBEDDING.search(name):
        return "embedding"
    if _HEAD.search(name):
        return "head"
    if dimensions < 2:
        return "vector"
    return "matrix" if dimensions == 2 and _BLOCK.search(name) else "other"
