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
    with dropout, a mask of one byte a value (on a CPU of s)      2 * C
    ============================================================= ===========

    That is about 36 C bytes in 16-bit precision and 64 C in float32. Rotary positions or QK-norm keep queries and keys twice,
    SwiGLU four times its inner width (on a CPU three times), a sliding window its keys and values twice, value embeddings
    their values twice more.
    `saved` equals, to the byte in GPT-2 and nearly so with other options, what autograd holds after an eager forward pass
    without dropout; `torch.compile` often saves less. Attention is taken for one fused kernel that stores no scores, but for
    bfloat16 on a CPU up to `EXPLICIT_LENGTH` tokens, where s bytes are counted for each weight that is kept (of a window that
    is computed in blocks, by the first block); longer contexts on a CPU with dropout keep scores too, and at least 4 * H * T
    bytes a token and block come on top. Also not counted: buffers within kernels, fragmentation, and a GPU's own context (some
    0.5 GB).

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
    mask = c if config.dropout else 0  # values of which dropout keeps whether they stay: bytes, or on a CPU values like them
    mask_bytes, first_mask_bytes = (s, FLOAT32_BYTES) if device_type == "cpu" else (1, 1)
    norm = c * FLOAT32_BYTES + (2 if made.norm == "layernorm" else 1) * FLOAT32_BYTES  # its input, its mean and 1/deviation
    inputs, matrices, scales = _fp8_changes(config, s) if fp8 else (0, 0, 0)
    fixed = 2 * norm + 2 * c * s + _mlp_values(made, device_type) * s + 2 * mask * mask_bytes + inputs
    may_be_explicit = device_type == "cpu" and precision == "bfloat16"
    varlen = document_mask and is_varlen(device_type, precision, made.head_dim, config.dropout)

    def window_of(layer: int) -> int | None:
        """The layer's window, where it makes a difference."""
        window = made.window(layer)
        return None if window is None or window >= t else window

    def block(layer: int) -> int:
        """What this block saves, if it keeps its activations."""
        attention = _attention_bytes(
            made,
            (micro_batch, t, s),
            None if varlen else window_of(layer),
            embedded=made.value_table(layer) is not None,
            masked=document_mask and not varlen,
            may_be_explicit=may_be_explicit,
            kept_twice=config.dropout > 0,
        )
        return scales + tokens * fixed + attention

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
        if not varlen:
            kinds = {window_of(layer) for layer in range(config.n_layer)}
            places += micro_batch * s * sum(scores_computed(t, window) for window in kinds)
    copies = matrices if narrow else 0
    blocks, again = sum(layers), 0
    if recompute == "blocks":
        blocks = tokens * (config.n_layer * c + made.value_embeddings * made.kv_width) * FLOAT32_BYTES
        again = max(layers) + tokens * made.fc_width * s + copies
    return ActivationBytes(
        blocks=blocks,
        # Ids of tokens and positions; then the final norm, and the gradients of its output and of the head's weight.
        ends=8 * tokens + places + tokens * (mask * first_mask_bytes + norm + c * final) + rows * c * FLOAT32_BYTES,
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


def _attention_bytes(
    made: Architecture,
    shape: tuple[int, int, int],
    window: int | None,
    *,
    embedded: bool,
    masked: bool,
    may_be_explicit: bool,
    kept_twice: bool,
) -> int:
    """What a layer's attention saves, from the fused projection to the heads' result.

    Args:
        shape: sequences, tokens of each, bytes of a value.
        window: below the number of tokens.
        embedded: whether the layer has value embeddings.
        masked: whether masks of documents, counted elsewhere, take the place of the window's own.
        may_be_explicit: whether `model/explicit.py` is used where the length allows it.
        kept_twice: whether it keeps weights also as dropout has left them.
    """
    batch, t, s = shape
    q, kv, rotary, normed = made.query_width, made.kv_width, made.positions == "rotary", made.qk_norm != "off"
    blocked = window is not None and is_blocked(t, window)
    # A window in blocks: the first one is attention of its own. Without, all tokens are; a window's own mask is for the kernel.
    first = window if window is not None and blocked else t
    explicit = may_be_explicit and first <= EXPLICIT_LENGTH and (window is None or blocked or masked)
    # Explicit attention takes the heads of all sequences in a row, which are copies, unless there is one sequence or one head.
    # What they are copies of goes, but for what a norm or a mixture of values reads in the backward pass.
    copied = explicit and batch > 1 and made.n_kv_head > 1
    values = t * q  # the result, as the next product reads it
    if not copied or normed or embedded:
        values += t * (q + 2 * kv)  # the projection
    if copied:
        values += first * (q + 2 * kv)
    else:
        values += t * ((rotary or normed) * (q + kv) + embedded * kv)
    values += t * embedded * kv  # the embeddings themselves
    if blocked:  # queries (of one sequence not copied), keys and values twice, the result; that of the first block
        values += (t - first) * ((batch > 1) * q + 4 * kv + q) + (not explicit) * first * q
    weights = weights_kept(first, masked=masked) * (1 + kept_twice) if explicit else 0
    scales = t * normed * (made.n_head + made.n_kv_head) + (t - explicit * first) * made.n_head  # and log-sum-exp
    mask = 0 if window is None or masked else 2 * first * first if blocked else t * t
    return batch * (values * s + made.n_head * weights * s + scales * FLOAT32_BYTES) + mask * s


def _mlp_values(made: Architecture, device_type: str) -> int:
    """Values that the MLP saves for a token: before and after the nonlinearity. SwiGLU has two before it, and but on a CPU,
    where `model/layers.py` writes it out, keeps the gate after it too."""
    return (2 if made.mlp != "swiglu" else 3 if device_type == "cpu" else 4) * made.mlp_hidden
