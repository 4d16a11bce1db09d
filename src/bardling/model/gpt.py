"""The model, in one file: GPT-2, and the options that make other families of it.

A decoder-only transformer (Radford et al. 2019): by default learned positions, layer norms before attention and MLP, fused
query-key-value projection, GELU, and a head tied to the token embedding. Parameters are named as in nanoGPT and Hugging Face's
GPT-2 (`transformer.h.0.attn.c_attn.weight`), matrices laid out as `nn.Linear` keeps them, [out, in]. The options keep these
names: `c_attn` holds the rows of queries, keys and values, `c_fc` those of SwiGLU's gate and then of what it gates.

Each option is independent, and off in GPT-2:

- RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), in `model/layers.py`;
- rotary positions (Su et al. 2021, arXiv:2104.09864), in `model/rotary.py`;
- QK-norm (Henry et al. 2020, arXiv:2010.04245; RMS over a head's channels, as Qwen3, arXiv:2505.09388);
- grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and sliding windows (Beltagy et al. 2020, arXiv:2004.05150, in
  turn with global layers as in Gemma 2, arXiv:2408.00118), in `model/attend.py`;
- SwiGLU (Shazeer 2020, arXiv:2002.05202) and squared ReLU (So et al. 2021, arXiv:2109.08668);
- an untied head (as GPT-NeoX, arXiv:2204.06745, and Llama), logit soft-capping (Gemma 2);
- zero-initialised residual projections (Zhang et al. 2019, "Fixup", arXiv:1901.09321; Yang et al. 2022, arXiv:2203.03466);
- value embeddings (after Zhou et al. 2024, "Value Residual Learning", arXiv:2410.17897, in the form of modded-nanogpt's speed
  runs: extra token embeddings, each mixed into the values of one of the first and one of the last layers by two weights).

Embeddings and head have `config.padded_vocab_size` rows. Rows beyond the vocabulary are zero, never get a gradient and so stay
zero. Losses come from `model/loss.py`, keys and values of earlier tokens from `model/cache.py`; the model knows nothing of
processes, devices or optimizers. With `GPT.recompute`, blocks keep only their inputs for the backward pass and compute the rest
again (Chen et al. 2016, arXiv:1604.06174): the same numbers from less memory.

Shapes: B batch, T time (tokens), C = n_embd, H = n_head, K = n_kv_head, D = head_dim, V = vocab_size, S = tokens looked at.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bardling.architecture import Architecture
from bardling.config import ModelConfig
from bardling.model.attend import attend, attend_window
from bardling.model.cache import CacheStep, KVCache
from bardling.model.documents import Packed, attend_packed, pack
from bardling.model.init import crop_positions, init_weights, require_positions
from bardling.model.layers import Embedding, Linear, RMSNorm, few_rows, is_few, make_norm, rms_norm, squared_relu, swiglu, tie
from bardling.model.loss import head_loss, soft_cap
from bardling.model.rotary import Rotation, rotate, rotation


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        made = config.architecture
        self.head_dim = made.head_dim
        self.heads = [made.n_head, made.n_kv_head, made.n_kv_head]
        self.window = made.window(layer)
        self.dropout = config.dropout
        self.c_attn = Linear(made.n_embd, made.query_width + 2 * made.kv_width, bias=made.bias)
        self.c_proj = Linear(made.query_width, made.n_embd, bias=made.bias)
        self.qk_norm, self.eps = made.qk_norm, made.norm_eps
        if made.qk_norm == "weight":
            self.ln_q = RMSNorm(made.head_dim, made.norm_eps)
            self.ln_k = RMSNorm(made.head_dim, made.norm_eps)
        if made.value_table(layer) is not None:
            self.value_mix = nn.Parameter(torch.empty(2))  # of the layer's own values, of the token's embedding

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None,
        step: CacheStep | None,
        layer: int,
        turn: Rotation | None = None,
        embedded: Tensor | None = None,
        packed: Packed | None = None,
    ) -> Tensor:
        qkv = self.c_attn(x)
        qkv = qkv.view(*qkv.shape[:2], -1, self.head_dim)  # [B, T, H + 2K, D]
        if self.qk_norm == "off" and turn is None:
            q, k, v = torch.split(qkv, self.heads, dim=2)  # [B, T, H or K, D]
        else:
            qk, v = torch.split(qkv, [self.heads[0] + self.heads[1], self.heads[2]], dim=2)
            q, k = torch.split(self._placed(qk, turn), self.heads[:2], dim=2)
        if embedded is not None:  # [B, T, K * D]
            own, other = self.value_mix.to(v.dtype).unbind()
            v = own * v + other * embedded.to(v.dtype).view_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, D]
        dropout = self.dropout if self.training else 0.0
        if cache is not None and step is not None:
            k, v = cache.write(layer, step, k, v)  # [B, K, S, D]
            mask, causal = step.view(self.window)
            y = attend(q, k, v, mask=mask, causal=causal, dropout=dropout)  # [B, H, T, D]
        elif packed is not None:
            y = attend_packed(q, k, v, packed, self.window, dropout=dropout)
        elif self.window is None:
            y = attend(q, k, v, dropout=dropout)
        else:
            y = attend_window(q, k, v, self.window, dropout=dropout)
        y = self.c_proj(y.transpose(1, 2).flatten(2))  # [B, T, C]
        return F.dropout(y, dropout) if dropout else y

    def _placed(self, qk: Tensor, turn: Rotation | None) -> Tensor:
        """Queries and keys [B, T, H + K, D], normed and turned to their positions; side by side, which takes fewer passes."""
        if self.qk_norm == "plain":
            qk = rms_norm(qk, None, self.eps)
        elif self.qk_norm == "weight":
            weights = zip((self.ln_q.weight, self.ln_k.weight), self.heads[:2], strict=True)
            qk = rms_norm(qk, torch.cat([weight.expand(heads, -1) for weight, heads in weights]), self.eps)
        return qk if turn is None else rotate(qk, turn)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them; SwiGLU's first one is two, of which one gates the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        made = config.architecture
        self.kind = made.mlp
        self.dropout = config.dropout
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.c_fc = Linear(made.n_embd, made.fc_width, bias=made.bias)
        self.c_proj = Linear(made.mlp_hidden, made.n_embd, bias=made.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.kind == "gelu":
            x = F.gelu(x, approximate=self.approximate)
        elif self.kind == "relu2":
            x = squared_relu(x)
        else:
            x = swiglu(x)
        y: Tensor = self.c_proj(x)
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        made = config.architecture
        self.ln_1 = make_norm(made)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(made)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None,
        step: CacheStep | None,
        layer: int,
        turn: Rotation | None = None,
        embedded: Tensor | None = None,
        packed: Packed | None = None,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, step, layer, turn, embedded, packed)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        made = config.architecture
        self.made: Architecture = made
        self.dropout = config.dropout
        self.recompute = False
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if made.positions == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        if made.value_embeddings:
            self.wve = nn.ModuleList(Embedding(config.padded_vocab_size, made.kv_width) for _ in range(made.value_embeddings))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(made)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        table: Tensor | None = None,  # to look tokens up in, if not in `wte`
    ) -> Tensor:
        batch, time = tokens.shape
        step = cache.plan(batch, time, tokens.device) if cache is not None else None
        positions = step.positions if step is not None else torch.arange(time, device=tokens.device)
        # A table of its own, which `tie` makes, takes the gradients of single rows.
        x = (
            self.wte(tokens) if table is None else F.embedding(tokens, table, sparse=not torch.compiler.is_compiling())
        )  # [B, T, C]
        turn = packed = None
        if documents is not None:
            dropout = self.dropout if self.training else 0.0
            packed = pack(documents, batch, time, self.made, _product_dtype(x), dropout=dropout)
        if self.made.positions == "learned":
            x = x + self.wpe(positions if packed is None else packed.positions)
        else:
            turn = rotation(positions, self.made.head_dim, self.made.rope_theta, _product_dtype(x))
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        embedded = [table(tokens) for table in self.wve] if self.made.value_embeddings else []  # each [B, T, K * D]
        again = self.recompute and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            number = self.made.value_table(layer)
            inputs = (x, cache, step, layer, turn, None if number is None else embedded[number], packed)
            if again:  # the state of the random numbers is kept where the same masks of dropout must be drawn again
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.training and self.dropout > 0)
            else:
                x = block(*inputs)
        if cache is not None:
            cache.advance(time)
        hidden: Tensor = self.ln_f(x)
        return hidden


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of `x` will have."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class GPT(nn.Module):
    """A language model: the transformer and its head, which is the token embedding unless `lm_head` is a matrix of its own.

    Args:
        config: the architecture; `vocab_size` must be known (above 0).
        seed: of the initial weights; None leaves them undefined, for a caller that loads weights. On the meta device there are
            no
            values either way: use `to_empty` and `init_weights` there.

    Raises:
        ValueError: `config.vocab_size` is 0.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise ValueError("model.vocab_size = 0: the vocabulary's size must be known before the model is built")
        self.config = config
        self.transformer = Transformer(config)
        if not self.transformer.made.tied:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if seed is not None and not self.transformer.wte.weight.is_meta:
            init_weights(self, seed)

    @property
    def recompute(self) -> bool:
        """Whether blocks compute their activations again in the backward pass instead of keeping them: gradients are equal to
        the bit, and the price is most of a second forward pass."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.transformer.recompute = value

    def hidden(
        self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [B, T, C] of `tokens` [B, T]; with a cache, of tokens that follow the cached ones; with
        documents, of tokens that see only their own, as `forward` says; with a table, looked up in that (see `ends`).

        Raises:
            ValueError: more tokens than `config.block_size`, or than the cache has room for; or both of cache and documents.
        """
        if cache is not None and documents is not None:
            raise ValueError("a cache holds one document a row: give either a cache or documents")
        if tokens.size(1) > self.config.block_size:
            raise ValueError(
                f"{tokens.size(1)} tokens are more than model.block_size = {self.config.block_size}: "
                "shorten the input, or build the model with a larger block_size"
            )
        hidden: Tensor = self.transformer(tokens, cache, documents, table)
        return hidden

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [padded_vocab_size, C]: the token embedding's, if they are tied."""
        return self.transformer.wte.weight if self.transformer.made.tied else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C], float32 at least; padded ids are left out."""
        weight = self.head_weight[: self.config.vocab_size]
        logits = few_rows(hidden, weight, None) if is_few(hidden) else F.linear(hidden, weight)
        return soft_cap(logits if logits.dtype == torch.float64 else logits.float(), self.config.logit_softcap)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest context to `block_size`, keeping the first positions.

        Raises:
            UserError: the model has fewer positions.
        """
        if self.transformer.made.positions == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(crop_positions(wpe.weight.detach(), block_size))
            wpe.num_embeddings = block_size
        else:
            require_positions(block_size, self.config.block_size)
        self.config = dataclasses.replace(self.config, block_size=block_size)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
        cache: KVCache | None = None,
        last_only: bool = False,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Loss of `targets`, or logits when there are none.

        Args:
            tokens: [B, T] int64 ids below `config.vocab_size`.
            targets: [B, T] int64, the id that should follow each token; -100 where no loss is wanted.
            reduction: "sum" for the loss summed over targets (nats), "none" for that of each target.
            cache: keys and values of the tokens before these; it takes in these too.
            last_only: logits of the last position only, [B, 1, V].
            documents: int32 [N + 1], where each document begins among the B * T tokens laid end to end, then B * T once or more
                (`data/packing.py`). A token then sees only its own document, and the loss is that of each document alone.

        Returns:
            float32 loss, a scalar or [B, T]; without targets, float32 logits [B, T, V].

        Raises:
            ValueError: more tokens than `config.block_size`, or than the cache has room for.
        """
        if targets is None:
            hidden = self.hidden(tokens, cache, documents)
            return self.head(hidden[:, -1:] if last_only else hidden)
        table, head = self.ends()
        return self.loss(self.hidden(tokens, cache, documents, table), targets, head, reduction)

    def ends(self) -> tuple[Tensor | None, Tensor]:
        """For one pass: the table that `hidden` looks tokens up in, None for the embedding itself, and the head's matrix."""
        weight = self.head_weight
        apart = self.transformer.made.tied and weight.device.type == "cpu" and torch.is_grad_enabled() and weight.requires_grad
        return tie(weight) if apart and not torch.compiler.is_compiling() else (None, weight)

    def loss(self, hidden: Tensor, targets: Tensor, head: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """Loss of `targets` [B, T] by the final hidden states [B, T, C] and the head's matrix, as `forward` returns it."""
        return head_loss(
            hidden,
            head,
            targets,
            vocab_size=self.config.vocab_size,
            reduction=reduction,
            softcap=self.config.logit_softcap,
        )
