"""Names, shapes and kinds of a model's parameters, from its configuration alone."""

import re
from typing import Literal

from bardling.config import ModelConfig, TuneConfig
from bardling.errors import UserError

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


def matrix_rows(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The parts of a block's linear layers: layer -> part, by its name in Llama -> rows, in order."""
    arch = config.architecture
    gated = arch.fc_width == 2 * arch.mlp_hidden
    return {
        "attn.c_attn": {"q_proj": arch.query_width, "k_proj": arch.kv_width, "v_proj": arch.kv_width},
        "attn.c_proj": {"o_proj": config.n_embd},
        "mlp.c_fc": {"gate_proj": arch.mlp_hidden, "up_proj": arch.mlp_hidden} if gated else {"up_proj": arch.fc_width},
        "mlp.c_proj": {"down_proj": config.n_embd},
    }


def adapted_parts(config: ModelConfig, tune: TuneConfig) -> dict[str, tuple[str, ...]]:
    """The parts with a LoRA adapter: layer of a block -> parts, without layers that have none.

    Raises:
        UserError: a target does not occur in this model.
    """
    rows, wanted = matrix_rows(config), set(tune.lora_targets)
    known = {part for parts in rows.values() for part in parts}
    if missing := wanted - known - {"all"}:
        raise UserError(f"tune.lora_targets: this model has no {min(missing)}: choose from {', '.join(sorted(known))}")
    chosen = {layer: tuple(part for part in parts if "all" in wanted or part in wanted) for layer, parts in rows.items()}
    return {layer: parts for layer, parts in chosen.items() if parts}


def adapter_shapes(config: ModelConfig, tune: TuneConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that LoRA trains in a `GPT(config)`."""
    shapes: dict[str, tuple[int, ...]] = {}
    first, end = tune.new_tokens
    if first < end:
        tables = (EMBEDDING,) if config.architecture.tied else (EMBEDDING, HEAD)
        shapes = {f"{table.removesuffix('weight')}adapter.rows": (end - first, config.n_embd) for table in tables}
    rows, matrices = matrix_rows(config), block_matrices(config)
    for number in range(config.n_layer):
        for layer, parts in adapted_parts(config, tune).items():
            prefix = f"transformer.h.{number}.{layer}.adapter"
            shapes |= {f"{prefix}.A.{part}": (tune.lora_rank, matrices[layer][0]) for part in parts}
            shapes |= {f"{prefix}.B.{part}": (rows[layer][part], tune.lora_rank) for part in parts}
    return shapes


def trained_shapes(config: ModelConfig, tune: TuneConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a run trains."""
    return adapter_shapes(config, tune) if tune.lora_rank else parameter_shapes(config)


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
