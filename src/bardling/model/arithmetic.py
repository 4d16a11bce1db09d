"""What a model costs, by arithmetic alone: parameters, FLOPs and bytes as pure functions of its configuration.

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

from bardling.architecture import Architecture
from bardling.config import ModelConfig
from bardling.errors import UserError

FLOAT32_BYTES = 4
FP8_MULTIPLE = 16  # sizes of float8 products, as `model/fp8.py` has it
BACKWARD_PER_FORWARD = 2  # each product has two in the backward pass: one for its input's gradient, one for its weight's
EXPLICIT_LENGTH = 256
"""Up to this many tokens, bfloat16 on a CPU computes all scores: PyTorch's fused kernel, with its slow backward pass, takes
1.2 to 5 times as long (measured on AVX-512-BF16); for longer contexts and in float32 the fused kernel wins."""
CAST_AGAIN_ENTRIES = 1 << 18
"""From this size on, a CPU makes a matrix' copy in the lower precision again in the backward pass instead of keeping it."""
LOGIT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}  # most float32 logits at a time, as `model/loss.py` has it
LOGIT_SLOPE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # most of their slopes at a time, likewise


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
    t, made = _context(config, context), config.architecture
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


def _context(config: ModelConfig, context: int | None) -> int:
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
    t = _context(config, context)
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


def recomputed_flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs a token of computing every block's activations a second time (`train.recompute` = 'blocks').

    That is a forward pass through the blocks, which stops before a block's last product: nothing waits for its result, unless
    dropout follows. The device does this work, but it is not the model's: MFU leaves it out. With it one speaks of hardware
    FLOPs utilization (PaLM, appendix B).
    """
    t = _context(config, context)
    rows = [row for row in forward_table(config, t) if row.name.startswith("block.")]
    return sum(row.forward for row in rows if config.dropout or row.name != "block.mlp.down") // t


def palm_flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """FLOPs to train on one token by PaLM's formula, 6N + 12LHQT (appendix B), for comparison with other systems' MFU.

    N leaves out what is only looked up and, as nanoGPT's MFU does, counts norms and biases as if they were matrices, which is
    why the result exceeds `flops_per_token` slightly. H * Q (heads times their size) is n_embd, unless head_dim says otherwise.
    """
    width = config.architecture.query_width
    return 6 * multiplied_parameters(config) + 12 * config.n_layer * width * _context(config, context)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the float32 weights, vocabulary padding included."""
    return FLOAT32_BYTES * parameters(config, padding=True)


@dataclass(frozen=True)
class ActivationBytes:
    """Memory that one process needs for a micro-batch, besides weights, gradients and optimizer (bytes)."""

    blocks: int
    """What the transformer blocks save for the backward pass: their inputs only, where the rest is computed again."""
    ends: int
    """What embedding, final norm and head save: the head has already made the gradients of its two inputs."""
    weight_copies: int
    """Copies of the blocks' matrices in the lower precision, which autocast makes; 0 in float32. Held in the forward pass, and
    in the backward pass by blocks that keep their activations."""
    head: int
    """What the head needs for a moment, while the rest is held: one chunk of logits, and the slopes of several."""
    again: int = 0
    """What one block makes again in the backward pass, with its gradients; 0 where blocks keep their activations."""

    @property
    def saved(self) -> int:
        """What waits for the backward pass."""
        return self.blocks + self.ends + (0 if self.again else self.weight_copies)

    @property
    def total(self) -> int:
        """The peak: in the head or, where blocks are computed again, perhaps in the largest of these."""
        return self.blocks + self.ends + max(self.weight_copies + self.head, self.again)


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    *,
    precision: str = "bfloat16",
    device_type: str = "cuda",
    context: int | None = None,
    fp8: bool = False,
    recompute: str = "none",
    document_mask: bool = False,
) -> ActivationBytes:
    """Work out the memory of the activations of one forward pass.

    A block of GPT-2 saves for each token, where a value has s bytes (2 under bfloat16 or float16 autocast, 4 in float32):

    ============================================================= ===========
    the residual stream before each norm, always float32          2 * C * 4
    each norm's output, as the next matrix product reads it       2 * C * s
    queries, keys and values; the heads' result                   4 * C * s
    the MLP before and after GELU                                 8 * C * s
    mean and 1/deviation of two norms; attention's log-sum-exp    16 + 4 * H
    with dropout, a mask of one byte a value                      2 * C
    ============================================================= ===========

    That is about 36 C bytes in 16-bit precision and 64 C in float32. Rotary positions or QK-norm keep queries and keys twice,
    SwiGLU four times its inner width (on a CPU three times), a sliding window its keys and values twice, value embeddings
    their values twice more.
    `saved` equals, to the byte in GPT-2 and nearly so with other options, what autograd holds after an eager forward pass
    without dropout; `torch.compile` often saves less. Attention is taken for one fused kernel that stores no scores, but for
    bfloat16 on a CPU up to `EXPLICIT_LENGTH` tokens, where 2 * H * T bytes a token are counted; on a CPU with dropout it is
    not, and at least 4 * H * T bytes a token and block come on top. Also not counted: buffers within kernels, fragmentation,
    and a GPU's own context (some 0.5 GB).

    In float8 a linear layer saves a byte for each number that it reads, of input and matrix. Attention's result is then kept in
    both formats, since its own backward pass reads it too.

    With `recompute` = 'blocks' (Chen et al. 2016, arXiv:1604.06174) a block saves 4 * C bytes a token, its input, and
    the tables of value embeddings 4 bytes a value. In the backward pass one block at a time holds all of the above, and the
    gradient of the MLP's widest tensor.

    Args:
        config: The model; its `vocab_size` must be known.
        micro_batch: Sequences per forward pass of one process.
        precision: 'float32', 'bfloat16' or 'float16'.
        device_type: 'cpu', 'cuda' or 'mps'; it decides how many logits exist at a time.
        context: Tokens per sequence; unset takes block_size.
        fp8: Whether the linear layers of blocks are computed in float8.
        recompute: 'none', or 'blocks' for `train.recompute`.
        document_mask: `data.document_mask`: where there is no kernel for documents, s bytes for each score of a sequence come
            on top, once for all layers.
    """
    t = _context(config, context)
    c, rows = config.n_embd, config.padded_vocab_size
    s = FLOAT32_BYTES if precision == "float32" else 2
    tokens = micro_batch * t
    made = config.architecture
    mask = c if config.dropout else 0
    norm = c * FLOAT32_BYTES + (2 if made.norm == "layernorm" else 1) * FLOAT32_BYTES  # its input, its mean and 1/deviation
    fixed = 2 * norm + 2 * c * s + _attention_bytes(made, s) + _mlp_values(made, device_type) * s + 2 * mask
    inputs, matrices, scales = _fp8_changes(config, s) if fp8 else (0, 0, 0)
    fixed += inputs
    scores = device_type == "cpu" and precision == "bfloat16" and t <= EXPLICIT_LENGTH

    def block(layer: int) -> int:
        """What this block saves, if it keeps its activations."""
        a_token, window = fixed, made.window(layer)
        if made.value_table(layer) is not None:
            a_token += 2 * made.kv_width * s
        if window is not None:
            return scales + tokens * a_token + micro_batch * _window_bytes(made, t, window, s)
        if scores:  # all softmax weights are kept, and no log-sum-exp
            a_token += made.n_head * (t * s - FLOAT32_BYTES)
        return scales + tokens * a_token

    layers = [block(layer) for layer in range(config.n_layer)]
    narrow = precision != "float32"
    sizes = [i * o for _, i, o in block_matrices(config).values()]
    matrices += s * sum(size for size in sizes if device_type != "cpu" or size < CAST_AGAIN_ENTRIES)
    logits = min(tokens * rows * FLOAT32_BYTES, LOGIT_CHUNK_BYTES.get(device_type, LOGIT_CHUNK_BYTES["cpu"]))
    slopes = min(tokens * rows * s, LOGIT_SLOPE_BYTES.get(device_type, LOGIT_SLOPE_BYTES["cpu"]))
    places = 8 * t if made.positions == "learned" else 2 * t * made.head_dim * s  # their ids, or their cosines and sines
    final = s if device_type == "cpu" and made.norm == "rmsnorm" else FLOAT32_BYTES  # as `model/layers.py` writes it out there
    if document_mask:
        places += 16 * t * micro_batch  # each token's place in its document, and the document's number
        if not is_varlen(device_type, precision, made.head_dim, config.dropout):
            kinds = {made.window(layer) for layer in range(config.n_layer)}
            places += micro_batch * s * sum(scores_computed(t, window) for window in kinds)
    copies = matrices if narrow else 0
    blocks, again = sum(layers), 0
    if recompute == "blocks":
        blocks = tokens * (config.n_layer * c + made.value_embeddings * made.kv_width) * FLOAT32_BYTES
        again = max(layers) + tokens * made.fc_width * s + copies
    return ActivationBytes(
        blocks=blocks,
        # Ids of tokens and positions; then the final norm, and the gradients of its output and of the head's weight.
        ends=8 * tokens + places + tokens * (mask + norm + c * final) + rows * c * FLOAT32_BYTES,
        weight_copies=copies * config.n_layer,
        # Logits and their softmax (and what capped them), and the slopes of some chunks; the final norm's output in float32 and
        # as the product reads it; the head's weight likewise.
        head=(3 if made.logit_softcap else 2) * logits
        + slopes
        + tokens * c * (FLOAT32_BYTES + s)
        + (rows * c * s if narrow else 0),
        again=again,
    )


def _fp8_changes(config: ModelConfig, s: int) -> tuple[int, int, int]:
    """What float8 adds (bytes) to what a block saves for each token, to the copies of its matrices, and besides."""
    sizes = block_matrices(config)
    taken = {name: sizes[name][1:] for name in fp8_layers(config)[0]}
    inputs = sum(i if name == "attn.c_proj" else i * (1 - s) for name, (i, _) in taken.items())
    return inputs, sum(i * o * (1 - s) for i, o in taken.values()), 2 * FLOAT32_BYTES * len(taken)


def _attention_bytes(made: Architecture, s: int) -> int:
    """What attention saves for a token, from the fused projection to the heads' result, without a window."""
    values = 2 * made.query_width + 2 * made.kv_width
    if made.positions == "rotary" or made.qk_norm != "off":
        values += made.query_width + made.kv_width
    scales = made.n_head + made.n_kv_head if made.qk_norm != "off" else 0
    return values * s + (made.n_head + scales) * FLOAT32_BYTES


def _mlp_values(made: Architecture, device_type: str) -> int:
    """Values that the MLP saves for a token: before and after the nonlinearity. SwiGLU has two before it, and but on a CPU,
    where `model/layers.py` writes it out, keeps the gate after it too."""
    return (2 if made.mlp != "swiglu" else 3 if device_type == "cpu" else 4) * made.mlp_hidden


def _window_bytes(made: Architecture, t: int, window: int, s: int) -> int:
    """What a layer with a window saves besides, for one sequence: its blocks of queries, keys and values, and their results."""
    if window >= t or not is_blocked(t, window):
        return 0
    return (t - window) * (made.query_width + 4 * made.kv_width) * s + t * made.query_width * s
