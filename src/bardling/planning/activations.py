"""Memory of the activations of a forward and backward pass, computed from the configuration, without torch.

Method: everything that `model/gpt.py` saves for the backward pass is listed and summed. A block of GPT-2 saves for each token,
with s bytes per value (2 under bfloat16 or float16 autocast, 4 in float32):

    the residual stream before each norm, always float32           2 * C * 4
    the output of each norm, as the next matmul reads it           2 * C * s
    queries, keys, values and attention output                     4 * C * s
    the MLP before and after GELU                                  8 * C * s
    mean and 1/std of two norms; attention's log-sum-exp           16 + 4 * H
    with dropout, two masks of one byte per value (s on a CPU)     2 * C

That is about 36 C bytes in 16-bit precision and 64 C in float32. Rotary embeddings or QK norm save queries and keys twice,
SwiGLU four times its hidden size (three times on a CPU), a sliding window its keys and values twice, value embeddings their
values twice more. In float8, a linear layer saves one byte per element of its input and of its matrix; attention's output is
then saved in both formats, because attention's own backward pass reads it too. With `train.recompute` = 'blocks' (Chen et al.
2016, arXiv:1604.06174), a block saves only its input, 4 * C bytes per token, and value embeddings 4 bytes per value; in the
backward pass, one block at a time holds all of the above and the gradient of the MLP's widest tensor.

Limits: `ActivationBytes.saved` equals what autograd holds after an eager forward pass without dropout, exactly for GPT-2 and
closely with other options; `torch.compile` often saves less. Attention is assumed to be one fused kernel that stores no scores,
except in bfloat16 on a CPU up to `EXPLICIT_LENGTH` tokens, where s bytes are counted for each attention weight that is kept
(with a blocked sliding window, for the first block). Longer contexts on a CPU with dropout also keep scores, at least 4 * H * T
bytes more per token and block. Not counted: workspace of kernels, fragmentation, and a GPU's CUDA context (some 0.5 GB).

Legend: T context (tokens), C n_embd, H n_head, s bytes per value.
"""

from dataclasses import dataclass

from bardling.config import ModelConfig
from bardling.config.architecture import Architecture
from bardling.planning.costs import (
    EXPLICIT_LENGTH,
    FLOAT32_BYTES,
    RECAST_MIN_ELEMENTS,
    attention_weights_kept,
    fp8_layers,
    is_blocked,
    is_varlen,
    scores_computed,
)
from bardling.planning.parameter_shapes import block_matrices

# Limits in `model/kernels/head_loss.py`: a chunk of float32 logits, and the gradients of several chunks.
LOGIT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
LOGIT_GRAD_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


@dataclass(frozen=True)
class ActivationBytes:
    """Memory of one process for a micro-batch, in addition to weights, gradients and optimizer state (bytes)."""

    blocks: int
    """Saved by the transformer blocks for the backward pass: only their inputs if the rest is recomputed."""
    embedding_and_head: int
    """Saved by the embedding, the final norm and the head, which has already computed the gradients of its two inputs."""
    weight_copies: int
    """Copies of the blocks' matrices in lower precision, which autocast makes; 0 in float32. They exist in the forward pass,
    and also in the backward pass of blocks that keep their activations."""
    head: int
    """Temporary memory of the head while everything else is held: a chunk of logits and the gradients of several."""
    recompute_buffer: int = 0
    """Activations and gradients of the block that is recomputed in the backward pass; 0 if blocks keep their activations."""

    @property
    def saved(self) -> int:
        """Held between the forward and the backward pass."""
        return self.blocks + self.embedding_and_head + (0 if self.recompute_buffer else self.weight_copies)

    @property
    def total(self) -> int:
        """Peak memory: in the head, or in the largest block that is recomputed."""
        return self.blocks + self.embedding_and_head + max(self.weight_copies + self.head, self.recompute_buffer)


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    *,
    precision: str = "bfloat16",
    device_type: str = "cuda",
    fp8: bool = False,
    recompute: str = "none",
    document_mask: bool = False,
) -> ActivationBytes:
    """Compute the memory of the activations of one forward and backward pass.

    Args:
        config: the model; its `vocab_size` must be known.
        micro_batch: sequences per forward pass of one process.
        precision: 'float32', 'bfloat16' or 'float16'.
        device_type: 'cpu', 'cuda' or 'mps'; it determines the size of a chunk of logits.
        fp8: whether the linear layers of blocks run in float8.
        recompute: 'none', or 'blocks' as for `train.recompute`.
        document_mask: whether attention is limited to documents. Without a varlen kernel, this adds s bytes per attention score
            of a sequence, once for all layers.
    """
    arch = config.architecture
    varlen = document_mask and is_varlen(device_type, precision, arch.head_dim, config.dropout)
    memory = _Memory(config, arch, micro_batch, config.block_size, precision, device_type, fp8, document_mask, varlen)
    layers = [memory.block(layer) for layer in range(config.n_layer)]
    weight_copies = memory.weight_copies_per_block()
    blocks, recompute_buffer = sum(layers), 0
    if recompute == "blocks":
        blocks = memory.tokens * (config.n_layer * config.n_embd + arch.value_embeddings * arch.kv_width) * FLOAT32_BYTES
        recompute_buffer = max(layers) + memory.tokens * arch.fc_width * memory.value_bytes + weight_copies
    return ActivationBytes(
        blocks=blocks,
        embedding_and_head=memory.embedding_and_head(),
        weight_copies=weight_copies * config.n_layer,
        head=memory.head(),
        recompute_buffer=recompute_buffer,
    )


@dataclass(frozen=True)
class _Memory:
    """The memory of each part of the model (bytes)."""

    config: ModelConfig
    arch: Architecture
    batch: int
    t: int  # tokens per sequence
    precision: str
    device_type: str
    fp8: bool
    document_mask: bool
    varlen: bool  # the document mask is applied by a varlen kernel

    @property
    def tokens(self) -> int:
        return self.batch * self.t

    @property
    def value_bytes(self) -> int:
        return FLOAT32_BYTES if self.precision == "float32" else 2

    @property
    def on_cpu(self) -> bool:
        return self.device_type == "cpu"

    @property
    def masked(self) -> bool:
        """Whether a mask of documents, shared by all layers, replaces the window's own."""
        return self.document_mask and not self.varlen

    def window(self, layer: int) -> int | None:
        """The layer's window if it is shorter than the sequence."""
        window = self.arch.window(layer)
        return None if window is None or window >= self.t else window

    def norm_per_token(self) -> int:
        """Input, mean and 1/std of a norm."""
        return (self.config.n_embd + (2 if self.arch.norm == "layernorm" else 1)) * FLOAT32_BYTES

    def block(self, layer: int) -> int:
        """Saved by a block that keeps its activations."""
        c, s = self.config.n_embd, self.value_bytes
        dropout = 2 * c * (s if self.on_cpu else 1) if self.config.dropout else 0  # on a CPU, masks have the dtype of values
        # SwiGLU saves two tensors before the product and, except on a CPU (`model/kernels/elementwise.py`), the gate after its
        # activation.
        mlp = (2 if self.arch.mlp != "swiglu" else 3 if self.on_cpu else 4) * self.arch.mlp_hidden
        per_token = 2 * self.norm_per_token() + 2 * c * s + mlp * s + dropout
        scales = 0
        if self.fp8:
            matrices, layers = block_matrices(self.config), fp8_layers(self.config)[0]
            per_token += sum(matrices[name][0] * (1 if name == "attn.c_proj" else 1 - s) for name in layers)
            scales = 2 * FLOAT32_BYTES * len(layers)
        return scales + self.tokens * per_token + self.attention(layer)

    def attention(self, layer: int) -> int:
        """Saved by a layer's attention, from the fused QKV projection to the attention output."""
        arch, t, s = self.arch, self.t, self.value_bytes
        window = None if self.varlen else self.window(layer)
        embedded = arch.value_table(layer) is not None
        q, kv, rotary, normed = arch.query_width, arch.kv_width, arch.positions == "rotary", arch.qk_norm != "off"
        blocked = window is not None and is_blocked(t, window)
        # The first block of a blocked window is separate causal attention. Otherwise it is all tokens, and a window needs a
        # mask.
        first = window if window is not None and blocked else t
        may_be_explicit = self.on_cpu and self.precision == "bfloat16"
        explicit = may_be_explicit and first <= EXPLICIT_LENGTH and (window is None or blocked or self.masked)
        # Explicit attention copies the heads of all sequences into one dimension, unless there is one sequence or one head. The
        # originals are freed, except those that a norm or a mix of values reads in the backward pass.
        copied = explicit and self.batch > 1 and arch.n_kv_head > 1
        values = t * q  # the output, as the next matmul reads it
        if not copied or normed or embedded:
            values += t * (q + 2 * kv)  # the projection
        if copied:
            values += first * (q + 2 * kv)
        else:
            values += t * ((rotary or normed) * (q + kv) + embedded * kv)
        values += t * embedded * kv  # the embeddings themselves
        if blocked:  # queries (not copied for one sequence), keys and values twice, the output; the output of the first block
            values += (t - first) * ((self.batch > 1) * q + 4 * kv + q) + (not explicit) * first * q
        kept = attention_weights_kept(first, masked=self.masked) if explicit else 0
        kept *= 2 if self.config.dropout else 1  # also after dropout
        scales = t * normed * (arch.n_head + arch.n_kv_head) + (t - explicit * first) * arch.n_head  # and log-sum-exp
        mask = 0 if window is None or self.masked else 2 * first * first if blocked else t * t
        return self.batch * (values * s + arch.n_head * kept * s + scales * FLOAT32_BYTES) + mask * s

    def weight_copies_per_block(self) -> int:
        """Copies of a block's matrices that are kept in lower precision."""
        s = self.value_bytes
        if self.precision == "float32":
            return 0
        sizes = {name: i * o for name, (i, o) in block_matrices(self.config).items()}
        kept = s * sum(size for size in sizes.values() if not self.on_cpu or size < RECAST_MIN_ELEMENTS)
        return kept + (sum(sizes[name] * (1 - s) for name in fp8_layers(self.config)[0]) if self.fp8 else 0)

    def embedding_and_head(self) -> int:
        """Ids of tokens and positions, the final norm, and the gradients of its output and of the head's weight."""
        arch, c, s, t = self.arch, self.config.n_embd, self.value_bytes, self.t
        positions = 8 * t if arch.positions == "learned" else 2 * t * arch.head_dim * s  # ids, or cosines and sines
        if self.document_mask:
            positions += 16 * t * self.batch  # each token's position in its document, and the index of the document
            if self.masked:
                windows = {self.window(layer) for layer in range(self.config.n_layer)}
                positions += self.batch * s * sum(scores_computed(t, window) for window in windows)
        dropout = c * (FLOAT32_BYTES if self.on_cpu else 1) if self.config.dropout else 0
        grad = c * (s if self.on_cpu and arch.norm == "rmsnorm" else FLOAT32_BYTES)  # see `model/kernels/elementwise.py`
        head_grad = self.config.padded_vocab_size * c * FLOAT32_BYTES
        return 8 * self.tokens + positions + self.tokens * (dropout + self.norm_per_token() + grad) + head_grad

    def head(self) -> int:
        """Temporary memory of the head loss."""
        c, s, rows = self.config.n_embd, self.value_bytes, self.config.padded_vocab_size
        logits = min(self.tokens * rows * FLOAT32_BYTES, LOGIT_CHUNK_BYTES.get(self.device_type, LOGIT_CHUNK_BYTES["cpu"]))
        grads = min(self.tokens * rows * s, LOGIT_GRAD_BYTES.get(self.device_type, LOGIT_GRAD_BYTES["cpu"]))
        final_norm = self.tokens * c * (FLOAT32_BYTES + s)  # its output in float32 and as the matmul reads it
        weight = 0 if self.precision == "float32" else rows * c * s  # the head's weight in lower precision
        # Logits, their softmax, and with a soft cap also the capped logits.
        return (3 if self.arch.logit_softcap else 2) * logits + grads + final_norm + weight
