"""Names and shapes of a model's parameters, from its configuration alone."""

from bardling.config import ModelConfig

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `GPT(config)`'s parameters, without building one."""
    made, width, rows = config.architecture, config.n_embd, config.padded_vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, width)}
    if made.positions == "learned":
        shapes["transformer.wpe.weight"] = (config.block_size, width)
    for table in range(made.value_embeddings):
        shapes[f"transformer.wve.{table}.weight"] = (rows, made.kv_width)
    for layer in range(config.n_layer):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in _block(config, layer).items()}
    shapes |= _with_bias("transformer.ln_f", (width,), bias=made.bias and made.norm == "layernorm")
    if not made.tied:
        shapes[HEAD] = (rows, width)
    return shapes


def _block(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    made, width = config.architecture, config.n_embd
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("ln_1", "ln_2"):
        shapes |= _with_bias(norm, (width,), bias=made.bias and made.norm == "layernorm")
    shapes |= _with_bias("attn.c_attn", (made.query_width + 2 * made.kv_width, width), bias=made.bias)
    shapes |= _with_bias("attn.c_proj", (width, made.query_width), bias=made.bias)
    if made.qk_norm == "weight":
        shapes |= {"attn.ln_q.weight": (made.head_dim,), "attn.ln_k.weight": (made.head_dim,)}
    if made.value_table(layer) is not None:
        shapes["attn.value_mix"] = (2,)
    shapes |= _with_bias("mlp.c_fc", (made.fc_width, width), bias=made.bias)
    return shapes | _with_bias("mlp.c_proj", (width, made.mlp_hidden), bias=made.bias)


def _with_bias(name: str, shape: tuple[int, ...], *, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": shape}
    return shapes | {f"{name}.bias": shape[:1]} if bias else shapes
