"""What a model costs, by arithmetic alone: parameters, FLOPs and bytes as pure functions of its configuration. What its
activations take is in `model/activations.py`.

Method: every tensor and every matrix product of `model/gpt.py` is listed once, by name; totals are sums over these lists. A
product of matrices [m, k] and [k, n] counts 2*m*k*n FLOPs (a multiplication and an addition each). Torch is not imported, so
that planning answers at once.

Limits: FLOPs are those of the matrix products only; norms, softmax, GELU and the optimizer are left out (a small part of the
arithmetic at usual sizes, though more of the time). Attention counts the full square of scores, as the papers below do,
although causal kernels skip half of it; a layer with a sliding window counts the two blocks of keys for each block of queries
that `model/attend.py` computes. Rows that pad the vocabulary are not counted as FLOPs: they are no work of the model's.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), table 1 and section 2.1: FLOPs per operation, backward = twice forward.
Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), appendix B: model FLOPs utilization and 6N + 12LHQT.
Hoffmann et al. 2022, "Chinchilla" (arXiv:2203.15556), appendix F: FLOPs per operation.

Legend: T context (tokens), C n_embd, V vocab_size, L n_layer, H n_head, Q channels of all query heads, K channels of all key
(or value) heads, F inner width of the MLP; in GPT-2 Q = K = C and F = 4 C.
"""

from dataclasses import dataclass

from bardling.config import ModelConfig
from bardling.errors import UserError

FLOAT32_BYTES = 4
FP8_MULTIPLE = 16  # sizes of float8 products, as `model/fp8.py` has it
BACKWARD_PER_FORWARD = 2  # each product has two in the backward pass: one for its input's gradient, one for its weight's
EXPLICIT_LENGTH = 512
"""Up to this many tokens, bfloat16 on a CPU keeps attention's weights (`model/explicit.py`): PyTorch's fused kernel, with its
slow backward pass, takes 1.5 to 4 times as long. Beyond, the memory is not worth it; in float32 the fused kernel wins."""
EXPLICIT_BLOCK = 128  # queries at a time, there
CAST_AGAIN_ENTRIES = 1 << 18
"""From this size on, a CPU makes a matrix' copy in the lower precision again in the backward pass instead of keeping it."""


@dataclass(frozen=True)
class Component:
    """One row of the parameter table."""

    name: str
    """Dotted name of the part; `block.*` parts stand in every block."""
    each: int
    """Parameters in one copy."""
    copies: int = 1
    """How often the part occurs (n_layer for parts of a block)."""

    @property
    def total(self) -> int:
        """Parameters in all copies."""
        return self.each * self.copies


@dataclass(frozen=True)
class Operation:
    """One row of the FLOP table: a matrix product of the forward pass over one sequence."""

    name: str
    """Dotted name of the product; `block.*` products occur in every block."""
    each: int
    """FLOPs of one occurrence, forward, for one sequence."""
    copies: int = 1
    """How often it occurs (n_layer for those of a block)."""

    @property
    def forward(self) -> int:
        """FLOPs of all occurrences in the forward pass."""
        return self.each * self.copies

    @property
    def backward(self) -> int:
        """FLOPs of all occurrences in the backward pass."""
        return self.forward * BACKWARD_PER_FORWARD


def _require_vocabulary(config: ModelConfig) -> None:
    if config.vocab_size < 1:
        raise UserError("model.vocab_size = 0: the tokenizer's size is not known here; set --model.vocab_size")


def parameter_table(config: ModelConfig) -> tuple[Component, ...]:
    """Trainable parameters by part, in the order of the forward pass. A tied head has none of its own.

    Raises:
        UserError: `vocab_size` is 0, that is, not known yet.
    """
    _require_vocabulary(config)
    made, c, blocks = config.architecture, config.n_embd, config.n_layer
    bias = made.bias
    norm = c + c * (bias and made.norm == "layernorm")
    qkv = made.query_width + 2 * made.kv_width
    row = c + c * (not made.tied) + made.value_embeddings * made.kv_width  # what each id has, padding included
    parts = [
        Component("embedding.tokens", config.vocab_size * c),
        Component("embedding.padding", (config.padded_vocab_size - config.vocab_size) * row),
    ]
    if made.positions == "learned":
        parts.append(Component("embedding.positions", config.block_size * c))
    if made.value_embeddings:
        parts.append(Component("embedding.values", config.vocab_size * made.kv_width, made.value_embeddings))
    parts += [
        Component("block.attention.norm", norm, blocks),
        Component("block.attention.qkv", qkv * c + qkv * bias, blocks),
    ]
    if made.qk_norm == "weight":
        parts.append(Component("block.attention.qk_norm", 2 * made.head_dim, blocks))
    if made.value_embeddings:
        parts.append(Component("block.attention.value_mix", 2, made.value_layers))
    parts += [
        Component("block.attention.proj", made.query_width * c + c * bias, blocks),
        Component("block.mlp.norm", norm, blocks),
        Component("block.mlp.up", made.fc_width * c + made.fc_width * bias, blocks),
        Component("block.mlp.down", made.mlp_hidden * c + c * bias, blocks),
        Component("final_norm", norm),
        Component("head (tied)", 0) if made.tied else Component("head", config.vocab_size * c),
    ]
    return tuple(parts)


def parameters(config: ModelConfig, *, positions: bool = True, padding: bool = False) -> int:
    """Count the trainable parameters.

    Args:
        config: The model; its `vocab_size` must be known.
        positions: Count the position embedding. The usual "non-embedding" N of a model with a tied head leaves out positions
            only, because the token embedding also works as the head; see `multiplied_parameters` for others.
        padding: Count the embedding rows that pad the vocabulary, as memory and files hold them. Published sizes do not.
    """
    skip = set() if positions else {"embedding.positions"}
    skip |= set() if padding else {"embedding.padding"}
    return sum(part.total for part in parameter_table(config) if part.name not in skip)


def multiplied_parameters(config: ModelConfig) -> int:
    """Count the parameters that a token is multiplied with: all but those that are only looked up (positions, value embeddings,
    and the token embedding where the head is another matrix)."""
    looked_up = {"embedding.padding", "embedding.positions", "embedding.values"}
    if not config.architecture.tied:
        looked_up.add("embedding.tokens")
    return sum(part.total for part in parameter_table(config) if part.name not in looked_up)


def block_parameters(config: ModelConfig) -> int:
    """Count the parameters in all transformer blocks together."""
    return sum(part.total for part in parameter_table(config) if part.name.startswith("block."))


def forward_table(config: ModelConfig, context: int | None = None) -> tuple[Operation, ...]:
    """FLOPs of each matrix product in the forward pass over one sequence of `context` tokens (unset: block_size)."""
    _require_vocabulary(config)
    t, made = context_of(config, context), config.architecture
    c, blocks, q, f = config.n_embd, config.n_layer, made.query_width, made.mlp_hidden
    windowed = sum(made.window(layer) is not None for layer in range(blocks))
    rows = [Operation("block.attention.qkv", 2 * t * c * (q + 2 * made.kv_width), blocks)]  # [T, C] @ [C, Q + 2K]
    # Scores are H times [T, Q/H] @ [Q/H, T]; values H times [T, T] @ [T, Q/H].
    if windowed < blocks:
        rows += [Operation(f"block.attention.{name}", 2 * t * t * q, blocks - windowed) for name in ("scores", "values")]
    if windowed:
        pairs = 2 * scores_computed(t, made.sliding_window) * q
        rows += [Operation(f"block.attention.{name} (window)", pairs, windowed) for name in ("scores", "values")]
    rows += [
        Operation("block.attention.proj", 2 * t * q * c, blocks),  # [T, Q] @ [Q, C]
        Operation("block.mlp.up", 2 * t * c * made.fc_width, blocks),  # [T, C] @ [C, F], twice as wide with a gate
        Operation("block.mlp.down", 2 * t * f * c, blocks),  # [T, F] @ [F, C]
        Operation("head", 2 * t * c * config.vocab_size),  # [T, C] @ [C, V]
    ]
    return tuple(rows)


def is_blocked(time: int, window: int) -> bool:
    """Whether a sliding window is computed in blocks, which saves work: see `model/attend.py`."""
    return time > 2 * window and time % window == 0


def is_varlen(device_type: str, precision: str, head_dim: int, dropout: float) -> bool:
    """Whether attention within documents has a kernel for varying lengths, and needs no mask: see `model/documents.py`."""
    narrow = precision in ("bfloat16", "float16")
    return device_type == "cuda" and narrow and not dropout and head_dim % 8 == 0 and head_dim <= 256


def scores_computed(time: int, window: int | None) -> int:
    """Pairs of a query and a key, per head, whose score is computed for a sequence of `time` tokens."""
    if window is None or not is_blocked(time, window):
        return time * time
    return window * window + (time - window) * 2 * window


def weights_kept(time: int, *, masked: bool = False) -> int:
    """Pairs of a query and a key, per head, whose weight `model/explicit.py` keeps for a sequence of `time` tokens."""
    if masked:
        return time * time
    ends = {start: min(start + EXPLICIT_BLOCK, time) for start in range(0, time, EXPLICIT_BLOCK)}
    return sum((end - start) * end for start, end in ends.items())


def context_of(config: ModelConfig, context: int | None) -> int:
    """`context`, or the model's own where it is left out.

    Raises:
        UserError: the model knows no such context.
    """
    t = config.block_size if context is None else context
    if not 1 <= t <= config.block_size:
        raise UserError(f"context = {t}: must be between 1 and model.block_size = {config.block_size}")
    return t


def flops_per_sequence(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one sequence of `context` tokens: forward and backward, matrix products only."""
    return sum(row.forward + row.backward for row in forward_table(config, context))


def flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one token within a context of `context` tokens (unset: block_size): the figure that MFU is made of.

    MFU = flops_per_token * tokens per second / peak FLOP/s of all devices together (PaLM, appendix B).
    """
    t = context_of(config, context)
    return flops_per_sequence(config, t) // t  # exact, but for sliding windows: all other products are multiples of t


def block_matrices(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """A block's linear layers by name: what `forward_table` calls their product, inputs, outputs."""
    made, c = config.architecture, config.n_embd
    return {
        "attn.c_attn": ("block.attention.qkv", c, made.query_width + 2 * made.kv_width),
        "attn.c_proj": ("block.attention.proj", made.query_width, c),
        "mlp.c_fc": ("block.mlp.up", c, made.fc_width),
        "mlp.c_proj": ("block.mlp.down", made.mlp_hidden, c),
    }


def fp8_layers(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of a block's linear layers that `fp8` computes in float8, and of those whose sizes do not allow it."""
    sound = {name: not (i % FP8_MULTIPLE or o % FP8_MULTIPLE) for name, (_, i, o) in block_matrices(config).items()}
    return [name for name in sound if sound[name]], [name for name in sound if not sound[name]]


def fp8_part(config: ModelConfig, context: int | None = None) -> float:
    """Part of a model's FLOPs, in training, that `fp8` computes in float8."""
    rows, matrices = forward_table(config, context), block_matrices(config)
    taken = {matrices[name][0] for name in fp8_layers(config)[0]}
    return sum(row.forward for row in rows if row.name in taken) / sum(row.forward for row in rows)


def recomputed_flops_per_token(
    config: ModelConfig,
    context: int | None = None,
    *,
    precision: str = "bfloat16",
    device_type: str = "cuda",
    fp8: bool = False,
    compiled: bool = False,
) -> int:
    """FLOPs a token of computing every block's activations a second time (`train.recompute` = 'blocks').

    That is a forward pass through the blocks, which stops before a block's last product: nothing waits for its result, unless
    dropout follows. An `autograd.Function` hands over what it saves only when it is through, and then the product is done: such
    are the products in float8, and those of large matrices in lower precision on a CPU (`model/layers.py`). Compiled code needs
    the result of the last block alone, for the norm that follows.

    The device does this work, but it is not the model's: MFU leaves it out. With it one speaks of hardware FLOPs utilization
    (PaLM, appendix B).

    Args:
        precision, device_type, fp8: as `activation_bytes` takes them.
        compiled: whether the blocks are compiled.
    """
    t, (down, inputs, outputs) = context_of(config, context), block_matrices(config)["mlp.c_proj"]
    in_float8 = fp8 and "mlp.c_proj" in fp8_layers(config)[0]
    lean = device_type == "cpu" and precision != "float32" and inputs * outputs >= CAST_AGAIN_ENTRIES
    through = config.dropout or (not compiled and (in_float8 or lean))
    rows = [row for row in forward_table(config, t) if row.name.startswith("block.")]
    whole = sum(row.forward for row in rows if through or row.name != down)
    return (whole + sum(row.each for row in rows if row.name == down and compiled and not through)) // t


def palm_flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one token by PaLM's formula, 6N + 12LHQT (appendix B), for comparison with other systems' MFU.

    N leaves out what is only looked up and, as nanoGPT's MFU does, counts norms and biases as if they were matrices, which is
    why the result exceeds `flops_per_token` slightly. H * Q (heads times their size) is n_embd, unless head_dim says otherwise.
    """
    width = config.architecture.query_width
    return 6 * multiplied_parameters(config) + 12 * config.n_layer * width * context_of(config, context)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the float32 weights, vocabulary padding included."""
    return FLOAT32_BYTES * parameters(config, padding=True)
