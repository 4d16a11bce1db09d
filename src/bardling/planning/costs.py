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

from dataclasses import dataclass

from bardling.config import ModelConfig
from bardling.errors import UserError

FLOAT32_BYTES = 4
FP8_MULTIPLE = 16  # required divisor of the sizes of float8 matmuls, see `model/kernels/fp8.py`
BACKWARD_PER_FORWARD = 2  # each matmul has two in the backward pass: for the gradients of its input and of its weight
EXPLICIT_LENGTH = 512
"""Up to this many tokens, attention in bfloat16 on a CPU keeps its weights (`model/kernels/cpu_attention.py`): PyTorch's fused
kernel takes 1.5 to 4 times as long, because of its slow backward pass. For longer sequences the speed is not worth the memory,
and in float32 the fused kernel is faster."""
EXPLICIT_BLOCK = 128  # number of queries processed together in that implementation
RECAST_MIN_ELEMENTS = 1 << 18
"""From this size, a CPU casts a matrix to lower precision again in the backward pass instead of keeping the copy."""


@dataclass(frozen=True)
class Component:
    """One row of the parameter table."""

    name: str
    """Dotted name of the component; every block has the `block.*` components."""
    each: int
    """Parameters of one copy."""
    copies: int = 1
    """Number of copies (n_layer for components of a block)."""

    @property
    def total(self) -> int:
        """Parameters in all copies."""
        return self.each * self.copies


class Operation(Component):
    """One row of the FLOP table: a matmul of the forward pass over one sequence, with its FLOPs instead of parameters."""

    @property
    def forward(self) -> int:
        """Total FLOPs in the forward pass."""
        return self.total

    @property
    def backward(self) -> int:
        """Total FLOPs in the backward pass."""
        return self.forward * BACKWARD_PER_FORWARD


def _require_vocabulary(config: ModelConfig) -> None:
    if config.vocab_size < 1:
        raise UserError("model.vocab_size = 0: the size of the tokenizer is not known; set --model.vocab_size")


def parameter_table(config: ModelConfig) -> tuple[Component, ...]:
    """Trainable parameters by component, in the order of the forward pass. A tied head has none.

    Raises:
        UserError: `vocab_size` is 0, that is, not known yet.
    """
    _require_vocabulary(config)
    arch, c, blocks = config.architecture, config.n_embd, config.n_layer
    bias = arch.bias
    norm = c + c * (bias and arch.norm == "layernorm")
    qkv = arch.query_width + 2 * arch.kv_width
    row = c + c * (not arch.tied) + arch.value_embeddings * arch.kv_width  # parameters per token id, padding included
    parts = [
        Component("embedding.tokens", config.vocab_size * c),
        Component("embedding.padding", (config.padded_vocab_size - config.vocab_size) * row),
    ]
    if arch.positions == "learned":
        parts.append(Component("embedding.positions", config.block_size * c))
    if arch.value_embeddings:
        parts.append(Component("embedding.values", config.vocab_size * arch.kv_width, arch.value_embeddings))
    parts += [
        Component("block.attention.norm", norm, blocks),
        Component("block.attention.qkv", qkv * c + qkv * bias, blocks),
    ]
    if arch.qk_norm == "weight":
        parts.append(Component("block.attention.qk_norm", 2 * arch.head_dim, blocks))
    if arch.value_embeddings:
        parts.append(Component("block.attention.value_mix", 2, arch.value_layers))
    parts += [
        Component("block.attention.proj", arch.query_width * c + c * bias, blocks),
        Component("block.mlp.norm", norm, blocks),
        Component("block.mlp.up", arch.fc_width * c + arch.fc_width * bias, blocks),
        Component("block.mlp.down", arch.mlp_hidden * c + c * bias, blocks),
        Component("final_norm", norm),
        Component("head (tied)", 0) if arch.tied else Component("head", config.vocab_size * c),
    ]
    return tuple(parts)


def parameters(config: ModelConfig, *, positions: bool = True, padding: bool = False) -> int:
    """Count the trainable parameters.

    Args:
        config: the model; its `vocab_size` must be known.
        positions: include the position embedding. The usual "non-embedding" N of a model with a tied head excludes only
            positions, because the token embedding is also the head; see `matmul_parameters` for other models.
        padding: include the embedding rows that pad the vocabulary, as memory and files do. Published sizes exclude them.
    """
    skip = set() if positions else {"embedding.positions"}
    skip |= set() if padding else {"embedding.padding"}
    return sum(part.total for part in parameter_table(config) if part.name not in skip)


def matmul_parameters(config: ModelConfig) -> int:
    """Count the parameters used in matmuls: all except those that are only looked up (positions, value embeddings, and the
    token embedding if the head is untied)."""
    looked_up = {"embedding.padding", "embedding.positions", "embedding.values"}
    if not config.architecture.tied:
        looked_up.add("embedding.tokens")
    return sum(part.total for part in parameter_table(config) if part.name not in looked_up)


def block_parameters(config: ModelConfig) -> int:
    """Count the parameters of all transformer blocks."""
    return sum(part.total for part in parameter_table(config) if part.name.startswith("block."))


def forward_table(config: ModelConfig, context: int | None = None) -> tuple[Operation, ...]:
    """FLOPs of each matmul in the forward pass over one sequence of `context` tokens (None: block_size)."""
    _require_vocabulary(config)
    t, arch = context_length(config, context), config.architecture
    c, blocks, q, f = config.n_embd, config.n_layer, arch.query_width, arch.mlp_hidden
    windowed = sum(arch.window(layer) is not None for layer in range(blocks))
    rows = [Operation("block.attention.qkv", 2 * t * c * (q + 2 * arch.kv_width), blocks)]  # [T, C] @ [C, Q + 2K]
    # Scores are H times [T, Q/H] @ [Q/H, T]; values H times [T, T] @ [T, Q/H].
    if windowed < blocks:
        rows += [Operation(f"block.attention.{name}", 2 * t * t * q, blocks - windowed) for name in ("scores", "values")]
    if windowed:
        pairs = 2 * scores_computed(t, arch.sliding_window) * q
        rows += [Operation(f"block.attention.{name} (window)", pairs, windowed) for name in ("scores", "values")]
    rows += [
        Operation("block.attention.proj", 2 * t * q * c, blocks),  # [T, Q] @ [Q, C]
        Operation("block.mlp.up", 2 * t * c * arch.fc_width, blocks),  # [T, C] @ [C, F], or [C, 2F] with a gate
        Operation("block.mlp.down", 2 * t * f * c, blocks),  # [T, F] @ [F, C]
        Operation("head", 2 * t * c * config.vocab_size),  # [T, C] @ [C, V]
    ]
    return tuple(rows)


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
    total = 0
    for start in range(0, time, EXPLICIT_BLOCK):
        end = min(start + EXPLICIT_BLOCK, time)
        total += (end - start) * end  # a block of queries attends to all keys up to its end
    return total


def context_length(config: ModelConfig, context: int | None) -> int:
    """`context`, or the model's block_size if it is None.

    Raises:
        UserError: the context is longer than block_size.
    """
    t = config.block_size if context is None else context
    if not 1 <= t <= config.block_size:
        raise UserError(f"context = {t}: must be between 1 and model.block_size = {config.block_size}")
    return t


def flops_per_sequence(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one sequence of `context` tokens: matmuls of the forward and backward pass."""
    return sum(row.forward + row.backward for row in forward_table(config, context))


def flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one token in a context of `context` tokens (None: block_size), as used for MFU.

    MFU = flops_per_token * tokens per second / peak FLOP/s of all devices together (PaLM, appendix B).
    """
    t = context_length(config, context)
    return flops_per_sequence(config, t) // t  # exact except with sliding windows: all other terms are multiples of t


def block_matrices(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Linear layers of a block: name -> (name in `forward_table`, inputs, outputs)."""
    arch, c = config.architecture, config.n_embd
    return {
        "attn.c_attn": ("block.attention.qkv", c, arch.query_width + 2 * arch.kv_width),
        "attn.c_proj": ("block.attention.proj", arch.query_width, c),
        "mlp.c_fc": ("block.mlp.up", c, arch.fc_width),
        "mlp.c_proj": ("block.mlp.down", arch.mlp_hidden, c),
    }


def fp8_layers(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of a block's linear layers that `fp8` runs in float8, and of those whose sizes do not allow it."""
    fits = {name: not (i % FP8_MULTIPLE or o % FP8_MULTIPLE) for name, (_, i, o) in block_matrices(config).items()}
    return [name for name in fits if fits[name]], [name for name in fits if not fits[name]]


def fp8_fraction(config: ModelConfig, context: int | None = None) -> float:
    """Fraction of a model's training FLOPs that `fp8` runs in float8."""
    rows, matrices = forward_table(config, context), block_matrices(config)
    in_float8 = {matrices[name][0] for name in fp8_layers(config)[0]}
    return sum(row.forward for row in rows if row.name in in_float8) / sum(row.forward for row in rows)


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
    t, (down, inputs, outputs) = context_length(config, context), block_matrices(config)["mlp.c_proj"]
    in_float8 = fp8 and "mlp.c_proj" in fp8_layers(config)[0]
    recast = device_type == "cpu" and precision != "float32" and inputs * outputs >= RECAST_MIN_ELEMENTS
    full_blocks = config.dropout or (not compiled and (in_float8 or recast))
    rows = [row for row in forward_table(config, t) if row.name.startswith("block.")]
    flops = sum(row.forward for row in rows if full_blocks or row.name != down)
    return (flops + sum(row.each for row in rows if row.name == down and compiled and not full_blocks)) // t


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
