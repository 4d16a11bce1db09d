"""How much memory the activations of a forward pass take, by arithmetic alone.

A part of a plan, beside `model/arithmetic.py`: what `model/gpt.py` keeps for the backward pass is listed one by one. Torch
is not imported.
"""

from dataclasses import dataclass

from bardling.architecture import Architecture
from bardling.config import ModelConfig
from bardling.model.arithmetic import (
    CAST_AGAIN_ENTRIES,
    EXPLICIT_LENGTH,
    FLOAT32_BYTES,
    block_matrices,
    context_of,
    fp8_layers,
    is_blocked,
    is_varlen,
    scores_computed,
    weights_kept,
)

LOGIT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}  # most float32 logits at a time, as `model/loss.py` has it
LOGIT_SLOPE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # most of their slopes at a time, likewise


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
    bfloat16 on a CPU up to `EXPLICIT_LENGTH` tokens, where s bytes are counted for each weight that is kept; longer contexts on
    a CPU with dropout keep scores too, and at least 4 * H * T bytes a token and block come on top. Also not counted: buffers
    within kernels, fragmentation, and a GPU's own context (some 0.5 GB).

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
    t = context_of(config, context)
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
        if scores:  # attention's weights are kept, and no log-sum-exp
            weights = weights_kept(t, masked=document_mask) * (2 if config.dropout else 1)  # and what dropout did to them
            return scales + tokens * (a_token - made.n_head * FLOAT32_BYTES) + micro_batch * made.n_head * weights * s
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
