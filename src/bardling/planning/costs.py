"""Parameters, FLOPs and bytes of a model as pure functions of its configuration, without torch.

Method: every tensor and every matmul of `model/gpt.py` is listed once, by name; totals are sums over these lists. A product of
matrices [m, k] and [k, n] counts 2*m*k*n FLOPs (one multiplication and one addition each). Activation memory is in
`planning/activations.py`.

Limits: FLOPs include matmuls only; norms, softmax, GELU and the optimizer are left out (a small fraction of the compute at
usual sizes, though more of the time). Attention counts the full square of scores, as the papers below do, although causal
kernels skip half of it; a layer with a sliding window counts the two blocks of keys per block of queries that
`model/kernels/attention.py` computes. Rows that pad the vocabulary do not count as FLOPs.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), table 1 and section 2.1: FLOPs per operation, backward = twice forward.
Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), appendix B: model FLOPs utilization and 6N + 12LHQT.
Hoffmann et al. 2022, "Chinchilla" (arXiv:2203.15556), appendix F: FLOPs per operation.

Legend: T context (tokens), C n_embd, V vocab_size, L n_layer, H n_head, Q channels of all query heads, K channels of all key
(or value) heads, F hidden size of the MLP; in GPT-2 Q = K = C and F = 4 C.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bardling.config import ModelConfig, TuneConfig
from bardling.errors import UserError
from bardling.planning.parameter_shapes import adapter_shapes, block_matrices, parameter_shapes

FLOAT32_BYTES = 4
FP8_MULTIPLE = 16  # required divisor of the sizes of float8 matmuls, see `model/kernels/fp8.py`
EXPLICIT_LENGTH = 512
"""Up to this many tokens, attention in bfloat16 on a CPU keeps its weights (`model/kernels/cpu_attention.py`): PyTorch's fused
kernel takes 1.5 to 4 times as long, because of its slow backward pass. For longer sequences the speed is not worth the memory,
and in float32 the fused kernel is faster."""
EXPLICIT_BLOCK = 128  # number of queries processed together in that implementation
RECAST_MIN_ELEMENTS = 1 << 18
"""From this size, a CPU casts a matrix to lower precision again in the backward pass instead of keeping the copy."""

BLOCK_COMPONENTS = {
    "ln_1": "attention.norm",
    "attn.c_attn": "attention.qkv",
    "attn.ln_": "attention.qk_norm",
    "attn.value_mix": "attention.value_mix",
    "attn.c_proj": "attention.proj",
    "ln_2": "mlp.norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
"""Start of the names of a block's parameters -> their component in the tables below."""


@dataclass(frozen=True)
class Component:
    """One row of the parameter table or of the FLOP table."""

    name: str  # dotted; every block has the `block.*` components
    each: int  # parameters of one copy, or FLOPs of its forward pass over one sequence
    copies: int = 1  # n_layer for most components of a block

    @property
    def total(self) -> int:
        return self.each * self.copies


def _require_vocabulary(config: ModelConfig) -> None:
    if config.vocab_size < 1:
        raise UserError("model.vocab_size = 0: the size of the tokenizer is not known; set --model.vocab_size")


def parameter_table(config: ModelConfig) -> tuple[Component, ...]:
    """Trainable parameters by component, in the order of the forward pass. A tied head has none.

    Raises:
        UserError: `vocab_size` is 0, that is, not known yet.
    """
    _require_vocabulary(config)
    arch, c, vocab, shapes = config.architecture, config.n_embd, config.vocab_size, parameter_shapes(config)

    def each(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"transformer.{prefix}"))

    row = c + c * (not arch.tied) + arch.value_embeddings * arch.kv_width  # parameters per token id
    parts = [
        Component("embedding.tokens", vocab * c),
        Component("embedding.padding", (config.padded_vocab_size - vocab) * row),
        Component("embedding.positions", each("wpe.")),
        Component("embedding.values", vocab * arch.kv_width, arch.value_embeddings),
        *(
            Component(f"block.{name}", each(f"h.0.{prefix}"), arch.value_layers if "value_mix" in name else config.n_layer)
            for prefix, name in BLOCK_COMPONENTS.items()
        ),
        Component("final_norm", each("ln_f.")),
        Component("head (tied)", 0) if arch.tied else Component("head", vocab * c),
    ]
    return tuple(part for part in parts if part.total or part.name in ("embedding.padding", "head (tied)"))


def parameters(config: ModelConfig, *, positions: bool = True, padding: bool = False) -> int:
    """Count the trainable parameters.

    Args:
        config: the model; its `vocab_size` must be known.
        positions: include the position embedding. The usual "non-embedding" N of a model with a tied head excludes only
            positions, because the token embedding is also the head; see `matmul_parameters` for other models.
        padding: include the embedding rows that pad the vocabulary, as memory and files do. Published sizes exclude them.
    """
    included = {"embedding.positions": positions, "embedding.padding": padding}
    return sum(part.total for part in parameter_table(config) if included.get(part.name, True))


def matmul_parameters(config: ModelConfig) -> int:
    """Count the parameters used in matmuls: all except those that are only looked up (positions, value embeddings, and the
    token embedding if the head is untied)."""
    looked_up = {"embedding.padding", "embedding.positions", "embedding.values"}
    if not config.architecture.tied:
        looked_up.add("embedding.tokens")
    return sum(part.total for part in parameter_table(config) if part.name not in looked_up)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of all transformer blocks."""
    return sum(part.total for part in parameter_table(config) if part.name.startswith("block."))


def forward_table(config: ModelConfig, context: int | None = None) -> tuple[Component, ...]:
    """FLOPs of each matmul in the forward pass over one sequence of `context` tokens (None: block_size)."""
    _require_vocabulary(config)
    t, arch, blocks = context_length(config, context), config.architecture, config.n_layer
    windowed = sum(arch.window(layer) is not None for layer in range(blocks))
    qkv, *others = (
        Component(f"block.{BLOCK_COMPONENTS[name]}", 2 * t * inputs * outputs, blocks)  # [T, inputs] @ [inputs, outputs]
        for name, (inputs, outputs) in block_matrices(config).items()
    )
    # Scores are H times [T, Q/H] @ [Q/H, T]; values H times [T, T] @ [T, Q/H].
    attention = (
        Component(f"block.attention.{name}{kind}", 2 * pairs * arch.query_width, layers)
        for kind, pairs, layers in (
            ("", t * t, blocks - windowed),
            (" (window)", scores_computed(t, arch.sliding_window), windowed),
        )
        for name in ("scores", "values")
        if layers
    )
    return (qkv, *attention, *others, Component("head", 2 * t * config.n_embd * config.vocab_size))  # head: [T, C] @ [C, V]


def is_blocked(time: int, window: int) -> bool:
    """Whether a sliding window is computed in blocks, which saves compute; see `model/kernels/attention.py`."""
    return time > 2 * window and time % window == 0


def is_varlen(device_type: str, precision: str, head_dim: int, dropout: float) -> bool:
    """Whether attention within documents uses a varlen kernel instead of a mask; see `model/document_masks.py`."""
    low_precision = precision in ("bfloat16", "float16")
    return device_type == "cuda" and low_precision and not dropout and head_dim % 8 == 0 and head_dim <= 256


def scores_computed(time: int, window: int | None) -> int:
    """Attention scores (pairs of a query and a key) computed per head for a sequence of `time` tokens."""
    if window is None or not is_blocked(time, window):
        return time * time
    return window * window + (time - window) * 2 * window


def attention_weights_kept(time: int, *, masked: bool = False) -> int:
    """Attention weights that `cpu_attention.py` keeps per head for a sequence of `time` tokens."""
    if masked:
        return time * time
    bounds = ((start, min(start + EXPLICIT_BLOCK, time)) for start in range(0, time, EXPLICIT_BLOCK))
    return sum((end - start) * end for start, end in bounds)  # a block of queries attends to all keys up to its end


def context_length(config: ModelConfig, context: int | None) -> int:
    """`context`, or the model's block_size if it is None.

    Raises:
        UserError: the context is longer than block_size.
    """
    t = config.block_size if context is None else context
    if not 1 <= t <= config.block_size:
        raise UserError(f"context = {t}: must be between 1 and model.block_size = {config.block_size}")
    return t


def flops_per_token(config: ModelConfig, context: int | None = None, *, tune: TuneConfig | None = None) -> int:
    """FLOPs to train on one token in a context of `context` tokens (None: block_size), as used for MFU.

    MFU = flops_per_token * tokens per second / peak FLOP/s of all devices together (PaLM, appendix B). With LoRA (`tune`), the
    adapters are added, and fixed matrices need no gradients of their own.
    """
    t = context_length(config, context)
    if tune is not None and tune.lora_rank:
        return _lora_flops_per_token(config, t, tune)
    # Each matmul has two in the backward pass, for the gradients of its input and of its weight. The division is exact except
    # with sliding windows: all other terms are multiples of t.
    return 3 * sum(row.total for row in forward_table(config, t)) // t


def _lora_flops_per_token(config: ModelConfig, t: int, tune: TuneConfig) -> int:
    rows, head_trained = forward_table(config, t), any(tune.new_tokens)
    trained = sum(row.total for row in rows if row.name.startswith(("block.attention.scores", "block.attention.values")))
    trained += sum(row.total for row in rows if row.name == "head" and head_trained)
    adapters = sum(math.prod(shape) for name, shape in adapter_shapes(config, tune).items() if not name.endswith(".rows"))
    return (2 * sum(row.total for row in rows) + trained) // t + 6 * adapters


def fp8_layers(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of a block's linear layers that `fp8` runs in float8, and of those whose sizes do not allow it."""
    fits = {name: not (i % FP8_MULTIPLE or o % FP8_MULTIPLE) for name, (i, o) in block_matrices(config).items()}
    return [name for name in fits if fits[name]], [name for name in fits if not fits[name]]


def fp8_fraction(config: ModelConfig, context: int | None = None) -> float:
    """Fraction of a model's training FLOPs that `fp8` runs in float8."""
    rows = forward_table(config, context)
    in_float8 = {f"block.{BLOCK_COMPONENTS[name]}" for name in fp8_layers(config)[0]}
    return sum(row.total for row in rows if row.name in in_float8) / sum(row.total for row in rows)


def recomputed_flops_per_token(
    config: ModelConfig,
    context: int | None = None,
    *,
    precision: str = "bfloat16",
    device_type: str = "cuda",
    fp8: bool = False,
    compiled: bool = False,
) -> int:
    """FLOPs per token to recompute the activations of every block in the backward pass (`train.recompute` = 'blocks').

    That is a forward pass through the blocks, which stops before the last matmul of a block: its output is not needed, unless
    dropout follows. An `autograd.Function` saves its tensors only when it returns, after its matmul is done; this applies to
    float8 and to large matrices in lower precision on a CPU (`model/kernels/linear.py`). Compiled code needs the output of the
    last block only, for the norm that follows.

    MFU excludes these FLOPs, because they are not the model's; hardware FLOPs utilization includes them (PaLM, appendix B).

    Args:
        precision, device_type, fp8: as for `activation_bytes`.
        compiled: whether the blocks are compiled.
    """
    t, (inputs, outputs) = context_length(config, context), block_matrices(config)["mlp.c_proj"]
    in_float8 = fp8 and "mlp.c_proj" in fp8_layers(config)[0]
    recast = device_type == "cpu" and precision != "float32" and inputs * outputs >= RECAST_MIN_ELEMENTS
    full_blocks = config.dropout or (not compiled and (in_float8 or recast))
    rows = [row for row in forward_table(config, t) if row.name.startswith("block.")]
    down = next(row for row in rows if row.name == "block.mlp.down")
    skipped = 0 if full_blocks else down.total - down.each * compiled
    return (sum(row.total for row in rows) - skipped) // t


def palm_flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one token by PaLM's formula, 6N + 12LHQT (appendix B), for comparison with the MFU of other systems.

    N excludes parameters that are only looked up but, as in nanoGPT, includes norms and biases, so the result slightly exceeds
    `flops_per_token`. H * Q (heads times channels per head) is n_embd unless head_dim is set.
    """
    width = config.architecture.query_width
    return 6 * matmul_parameters(config) + 12 * config.n_layer * width * context_length(config, context)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the float32 weights, including vocabulary padding."""
    return FLOAT32_BYTES * parameters(config, padding=True)


def float32_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of float32 tensors of these shapes."""
    return FLOAT32_BYTES * sum(map(math.prod, shapes.values()))
