"""GPT-2: the model, in one file.

A decoder-only transformer (Radford et al. 2019): learned positions, layer norms before attention and MLP, fused query-key-value
projection, GELU, and a head tied to the token embedding. Parameters are named as in nanoGPT and Hugging Face's GPT-2
(`transformer.h.0.attn.c_attn.weight`), matrices laid out as `nn.Linear` keeps them, [out, in].

The embedding has `config.padded_vocab_size` rows. Rows beyond the vocabulary are zero, never get a gradient and so stay zero.
Losses come from `model/loss.py`, keys and values of earlier tokens from `model/cache.py`; the model knows nothing of
processes, devices or optimizers.

Shapes: B batch, T time (tokens), C = n_embd, H = n_head, D = C / H, V = vocab_size, S = tokens looked at.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.model.cache import CacheStep, KVCache
from bardling.model.init import crop_positions, init_weights
from bardling.model.loss import head_loss


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the memory as it is: `init_weights` draws every parameter, and drawing twice costs seconds on large models."""

    def forward(self, x: Tensor) -> Tensor:
        return _few_rows(x, self.weight, self.bias) if _is_few(x) else F.linear(x, self.weight, self.bias)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the memory as it is, as in `_Linear`."""


def _is_few(x: Tensor) -> bool:
    """Whether `x` is one token of each of 7 to 32 rows in inference on a CPU, where `_few_rows` is faster."""
    return not torch.is_grad_enabled() and x.dim() == 3 and x.size(1) == 1 and 7 <= x.size(0) <= 32 and _is_cpu_float32(x)


def _is_cpu_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x [B, 1, in] as the transpose of weight @ x.T: with few rows about 1.5 times as fast on a CPU, because
    the large operand is then read in the order in which it lies."""
    columns = x[:, 0].t()  # [in, B]
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # [out, B]
    return product.t()[:, None]  # [B, 1, out]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = _Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = _Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None, step: CacheStep | None, layer: int) -> Tensor:
        batch, time, width = x.shape
        qkv = self.c_attn(x).view(batch, time, 3, self.n_head, width // self.n_head)  # [B, T, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, D]
        mask, causal = None, True
        if cache is not None and step is not None:
            k, v = cache.write(layer, step, k, v)  # [B, H, S, D]
            mask, causal = step.mask, step.causal
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)  # [B, H, T, D]
        y = self.c_proj(y.transpose(1, 2).reshape(batch, time, width))  # [B, T, C]
        return F.dropout(y, dropout) if dropout else y


class MLP(nn.Module):
    """Two matrices with a GELU between them, four times as wide as the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.c_fc = _Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = _Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, step: CacheStep | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, step, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.wte = _Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = _Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        batch, time = tokens.shape
        step = cache.plan(batch, time, tokens.device) if cache is not None else None
        positions = step.positions if step is not None else torch.arange(time, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # [B, T, C]
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        for layer, block in enumerate(self.h):
            x = block(x, cache, step, layer)
        if cache is not None:
            cache.advance(time)
        hidden: Tensor = self.ln_f(x)
        return hidden


class GPT(nn.Module):
    """A GPT-2 with a head tied to its token embedding.

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
        if seed is not None and not self.transformer.wte.weight.is_meta:
            init_weights(self, seed)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, C] of `tokens` [B, T]; with a cache, of tokens that follow the cached ones.

        Raises:
            ValueError: more tokens than `config.block_size`, or than the cache has room for.
        """
        if tokens.size(1) > self.config.block_size:
            raise ValueError(
                f"{tokens.size(1)} tokens are more than model.block_size = {self.config.block_size}: "
                "shorten the input, or build the model with a larger block_size"
            )
        hidden: Tensor = self.transformer(tokens, cache)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C], float32 at least; padded ids are left out."""
        weight = self.transformer.wte.weight[: self.config.vocab_size]
        logits = _few_rows(hidden, weight, None) if _is_few(hidden) else F.linear(hidden, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest context to `block_size`, keeping the first positions.

        Raises:
            UserError: the model has fewer positions.
        """
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(crop_positions(wpe.weight.detach(), block_size))
        wpe.num_embeddings = block_size
        self.config = dataclasses.replace(self.config, block_size=block_size)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Loss of `targets`, or logits when there are none.

        Args:
            tokens: [B, T] int64 ids below `config.vocab_size`.
            targets: [B, T] int64, the id that should follow each token; -100 where no loss is wanted.
            reduction: "sum" for the loss summed over targets (nats), "none" for that of each target.
            cache: keys and values of the tokens before these; it takes in these too.
            last_only: logits of the last position only, [B, 1, V].

        Returns:
            float32 loss, a scalar or [B, T]; without targets, float32 logits [B, T, V].

        Raises:
            ValueError: more tokens than `config.block_size`, or than the cache has room for.
        """
        hidden = self.hidden(tokens, cache)
        if targets is None:
            return self.head(hidden[:, -1:] if last_only else hidden)
        return head_loss(hidden, self.transformer.wte.weight, targets, vocab_size=self.config.vocab_size, reduction=reduction)
