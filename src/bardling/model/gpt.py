"""The model: GPT-2, and the options that turn it into other families.

A decoder-only transformer (Radford et al. 2019), by default with learned positions, layer norms before attention and MLP, GELU,
and a head tied to the token embedding. Parameters are named as in nanoGPT and Hugging Face's GPT-2
(`transformer.h.0.attn.c_attn.weight`), with matrices in the layout of `nn.Linear`, [out, in]. `c_attn` holds the rows of
queries, keys and values; `c_fc` those of SwiGLU's gate, then those of the values that it gates.

Each option is independent, and off in GPT-2:

- RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467); rotary positions (Su et al. 2021, arXiv:2104.09864);
- QK-norm (Henry et al. 2020, arXiv:2010.04245; RMS over a head's channels, as in Qwen3, arXiv:2505.09388);
- grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and sliding windows (Beltagy et al. 2020, arXiv:2004.05150,
  alternating with global layers as in Gemma 2, arXiv:2408.00118);
- SwiGLU (Shazeer 2020, arXiv:2002.05202) and squared ReLU (So et al. 2021, arXiv:2109.08668);
- an untied head (as in GPT-NeoX, arXiv:2204.06745, and Llama), logit soft-capping (Gemma 2);
- zero-initialised residual projections (Zhang et al. 2019, "Fixup", arXiv:1901.09321; Yang et al. 2022, arXiv:2203.03466);
- value embeddings (after Zhou et al. 2024, "Value Residual Learning", arXiv:2410.17897, in the form of modded-nanogpt's speed
  runs: extra token embeddings, each mixed into the values of one of the first and one of the last layers by two weights).

Embeddings and head have `config.padded_vocab_size` rows. Rows beyond the vocabulary are zero, never get a gradient and so stay
zero. With `GPT.recompute`, blocks save only their inputs for the backward pass and compute the rest again (Chen et al. 2016,
arXiv:1604.06174): the same numbers from less memory. Devices differ in how they compute linear layers, attention, norms and
losses, which is decided in `model/kernels/`.

Shapes: B batch, T time (tokens), C = n_embd, H = n_head, K = n_kv_head, D = head_dim, V = vocab_size, S = tokens attended to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bardling.config import ModelConfig, TuneConfig
from bardling.config.architecture import Architecture
from bardling.extensions import ACTIVATIONS
from bardling.model.cache import CacheStep, KVCache
from bardling.model.document_masks import make_documents
from bardling.model.init import init_weights
from bardling.model.kernels.attention import Documents, attention
from bardling.model.kernels.elementwise import rms_norm
from bardling.model.kernels.head_loss import VocabularyShard, head_logits, head_loss
from bardling.model.kernels.linear import tied_views
from bardling.model.kernels.select import product_dtype
from bardling.model.layers import Embedding, Int8Linear, Linear, RMSNorm, adapted, dropout, make_norm
from bardling.model.rotary import Rotation, rotate, rotation


class Positions(NamedTuple):
    """Where the tokens of a forward pass are and what they may see: the same for every layer."""

    rotation: Rotation | None = None  # with rotary positions
    documents: Documents | None = None  # where tokens see only their own document
    cache: KVCache | None = None  # in generation: the tokens before these,
    step: CacheStep | None = None  # and where these go


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        arch = config.architecture
        self.layer = layer
        self.head_dim = arch.head_dim
        self.heads = [arch.n_head, arch.n_kv_head, arch.n_kv_head]
        self.window = arch.window(layer)
        self.dropout = config.dropout
        self.c_attn = Linear(arch.n_embd, arch.query_width + 2 * arch.kv_width, bias=arch.bias)
        self.c_proj = Linear(arch.query_width, arch.n_embd, bias=arch.bias)
        self.qk_norm, self.eps = arch.qk_norm, arch.norm_eps
        if arch.qk_norm == "weight":
            self.ln_q = RMSNorm(arch.head_dim, arch.norm_eps)
            self.ln_k = RMSNorm(arch.head_dim, arch.norm_eps)
        if arch.value_table(layer) is not None:
            self.value_mix = nn.Parameter(torch.empty(2))  # weights of the layer's own values and of the value embedding

    def forward(self, x: Tensor, positions: Positions, value_embedding: Tensor | None = None) -> Tensor:
        p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x)  # [B, T, (H + 2K) * D]
        qkv = qkv.view(*qkv.shape[:2], -1, self.head_dim)  # [B, T, H + 2K, D]
        if self.qk_norm == "off" and positions.rotation is None:
            q, k, v = torch.split(qkv, self.heads, dim=2)  # [B, T, H or K, D]
        else:  # norm and rotate queries and keys together, which takes fewer passes over memory
            qk, v = torch.split(qkv, [self.heads[0] + self.heads[1], self.heads[2]], dim=2)
            q, k = torch.split(self._norm_and_rotate(qk, positions.rotation), self.heads[:2], dim=2)
        if value_embedding is not None:  # [B, T, K * D]
            own, other = self.value_mix.to(v.dtype).unbind()
            v = own * v + other * value_embedding.to(v.dtype).view_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, D]
        if positions.cache is not None and positions.step is not None:
            k, v = positions.cache.write(self.layer, positions.step, k, v)  # [B, K, S, D]
            mask, causal = positions.step.mask_for(self.window)
            y = attention(q, k, v, mask=mask, causal=causal, dropout=p)  # [B, H, T, D]
        else:
            y = attention(q, k, v, window=self.window, documents=positions.documents, dropout=p)  # [B, H, T, D]
        y = y.transpose(1, 2).flatten(2)  # [B, T, H * D]
        return dropout(self.c_proj(y), p)  # [B, T, C]

    def _norm_and_rotate(self, qk: Tensor, rotation: Rotation | None) -> Tensor:
        """Apply QK-norm and rotary positions to queries and keys [B, T, H + K, D]."""
        if self.qk_norm == "plain":
            qk = rms_norm(qk, None, self.eps)
        elif self.qk_norm == "weight":
            weights = zip((self.ln_q.weight, self.ln_k.weight), self.heads[:2], strict=True)
            weight = torch.cat([weight.expand(heads, -1) for weight, heads in weights])  # [H + K, D]
            qk = rms_norm(qk, weight, self.eps)
        return qk if rotation is None else rotate(qk, rotation)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity in between; with SwiGLU the first one also computes a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        arch = config.architecture
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS.get("model.mlp", arch.mlp)
        if arch.mlp == "gelu" and config.gelu == "tanh":
            self.activation = partial(self.activation, approximate="tanh")
        self.dropout = config.dropout
        self.c_fc = Linear(arch.n_embd, arch.fc_width, bias=arch.bias)
        self.c_proj = Linear(arch.mlp_hidden, arch.n_embd, bias=arch.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # [B, T, C] -> [B, T, F]; SwiGLU takes [B, T, 2F]
        return dropout(self.c_proj(x), self.dropout if self.training else 0.0)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        arch = config.architecture
        self.ln_1 = make_norm(arch)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(arch)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Positions, value_embedding: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, value_embedding)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        arch = config.architecture
        self.architecture: Architecture = arch
        self.dropout = config.dropout
        self.recompute = False
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if arch.positions == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        if arch.value_embeddings:
            self.wve = nn.ModuleList(Embedding(config.padded_vocab_size, arch.kv_width) for _ in range(arch.value_embeddings))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(arch)

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        table: Tensor | None = None,  # a view of `wte.weight` to look tokens up in: see `tied_views`
    ) -> Tensor:
        x = self.wte(tokens, table)  # [B, T, C]
        places, positions = self.locate(x, tokens, cache, documents)
        hidden: Tensor = self.ln_f(self.layers(self.enter(x, places), positions, tokens))
        return hidden

    def locate(self, x: Tensor, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> tuple[Tensor, Positions]:
        """Where the tokens [B, T] of hidden states x are: numbers [T] or [B, T] for `enter`, and what every layer needs."""
        batch, time = tokens.shape  # a process may have the hidden states of some of them only
        arch, p = self.architecture, self.dropout if self.training else 0.0
        step = None if cache is None else cache.next_step(batch, time, x.device)
        packed = None if documents is None else make_documents(documents, batch, time, arch, product_dtype(x), dropout=p)
        places = torch.arange(time, device=x.device) if step is None else step.positions  # [T] or [B, T]
        angles = None
        if arch.positions == "rotary":
            angles = rotation(places, arch.head_dim, arch.rope_theta, product_dtype(x))
        return places if packed is None else packed.positions, Positions(angles, packed, cache, step)

    def enter(self, x: Tensor, places: Tensor) -> Tensor:
        """The input of the first layer: token embeddings x [B, T, C], with learned positions added, and dropout."""
        if self.architecture.positions == "learned":
            x = x + self.wpe(places)
        return dropout(x, self.dropout if self.training else 0.0)

    def layers(self, x: Tensor, positions: Positions, tokens: Tensor) -> Tensor:
        """Run the blocks on x [B, T, C]."""
        arch, p = self.architecture, self.dropout if self.training else 0.0
        value_embeddings = [wve(tokens) for wve in self.wve] if arch.value_embeddings else []  # each [B, T, K * D]
        recompute = self.recompute and positions.cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            number = arch.value_table(layer)
            inputs = (x, positions, None if number is None else value_embeddings[number])
            # The RNG state matters only for drawing the same dropout masks again.
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=p > 0) if recompute else block(*inputs)
        if positions.cache is not None:
            positions.cache.advance(tokens.size(1))
        return x


class GPT(nn.Module):
    """A language model: the transformer and its head, which is the token embedding unless the model has an `lm_head`.

    `seed` is that of the initial weights; None leaves them undefined, for a caller that loads weights. On the meta device there
    are no values either way: call `to_empty` and `init_weights` there. Without a vocabulary, raises ValueError.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise ValueError("model.vocab_size = 0: set the size of the vocabulary before building the model")
        self.config = config
        self.transformer = Transformer(config)
        if not self.transformer.architecture.tied:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lora: TuneConfig | None = None  # of a model with adapters (`model/lora.py`)
        self.vocabulary: VocabularyShard | None = None  # of a model whose head has only a range of the ids
        self.int8_head: Int8Linear | None = None  # of a model converted for inference (`generation/weights.py`)
        if seed is not None and not self.transformer.wte.weight.is_meta:
            init_weights(self, seed)

    @property
    def recompute(self) -> bool:
        """Whether blocks recompute their activations in the backward pass; gradients are bitwise equal."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.transformer.recompute = value

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [padded_vocab_size, C]; that of the embedding if the head has int8 weights."""
        tied = self.transformer.architecture.tied or self.int8_head is not None
        return adapted(self.transformer.wte if tied else self.lm_head)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.transformer.wte.weight.device

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        output: Literal["loss", "scores", "logits", "hidden"] | None = None,
        transformer: Callable[..., Tensor] | None = None,
        tally: Tensor | None = None,
    ) -> Tensor:
        """Loss, logits or final hidden states of `tokens`.

        Args:
            tokens: [B, T] int64 ids below `config.vocab_size`.
            targets: [B, T] int64, the id that should follow each token; -100 for no loss.
            reduction: "sum" for the loss summed over targets (nats), "none" for the loss of each target.
            cache: keys and values of the tokens before these; those of `tokens` are added.
            documents: int32 [N + 1], where each document begins among the B * T tokens laid end to end, then B * T once or more
                (`data/batches/packing.py`). A token then sees only its own document; the loss is that of each document alone.
            output: what to return; None for the loss with targets, else the logits. "scores": for each target its loss, and 1
                or 0 for whether it is the likeliest token; without gradients.
            transformer: called in place of `self.transformer`, such as a compiled version of it.
            tally: [vocab_size] bool; a summed loss becomes [2]: of all targets, and of those in the tally, without a gradient.

        Returns:
            Float32 loss, a scalar, [2] or [B, T]; float32 scores [2, B, T] or logits [B, T, V]; or hidden states [B, T, C],
            which `head` takes.

        Raises:
            ValueError: more tokens than `config.block_size` or than the cache has room for, both a cache and documents, or no
            targets for a loss.
        """
        output = output or ("logits" if targets is None else "loss")
        if output in ("loss", "scores") and targets is None:
            raise ValueError(f"output = {output!r} needs targets")
        if cache is not None and documents is not None:
            raise ValueError("a cache holds one document per row: give either a cache or documents")
        if tokens.size(1) > self.config.block_size:
            raise ValueError(
                f"{tokens.size(1)} tokens exceed model.block_size = {self.config.block_size}: "
                "shorten the input, or build the model with a larger block_size"
            )
        tied = output == "loss" and self.transformer.architecture.tied
        table, head = tied_views(self.head_weight) if tied else (None, self.head_weight)
        transformer = self.transformer if transformer is None else transformer  # a compiled module cannot be tested for truth
        hidden = transformer(tokens, cache, documents, table)
        if output == "hidden":
            return hidden
        if output == "logits" or targets is None:
            return self.head(hidden)
        size, softcap = self.config.vocab_size, self.config.logit_softcap
        weight = head if self.int8_head is None else self.int8_head.weight
        loss = partial(head_loss, hidden, weight, targets, vocab_size=size, softcap=softcap, shard=self.vocabulary)
        return loss(reduction="none", greedy=True) if output == "scores" else loss(reduction=reduction, tally=tally)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C], at least float32, without those of padding."""
        weight = self.head_weight if self.int8_head is None else self.int8_head.weight
        size, softcap = self.config.vocab_size, self.config.logit_softcap
        return head_logits(hidden, weight, vocab_size=size, softcap=softcap, shard=self.vocabulary)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode and back. In evaluation mode already, it need not be walked."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
