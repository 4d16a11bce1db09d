"""Context parallelism: each process of a context group computes consecutive tokens of every sequence.

Only attention needs the other tokens. There, each process has all tokens for a fraction of the heads, so that kernels, masks,
windows and caches run as they are (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509):

    word embedding, positions   look up the ids of the process's own tokens
    c_attn                      computes all heads of its tokens, and exchanges them for all tokens of its heads
    c_proj of attention         exchanges them back
    head and loss               are those of its tokens; the loss is summed over processes, and other results are gathered

Each process has the gradients of its tokens, which FSDP2 adds up as it does those of samples. Tokens are shared as in
`tensor.py`.

Limits: as in `tensor.py`; no value embeddings. Shapes: B batch, T tokens, t a share of them, n processes, w channels of a
fraction of the heads.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.distributed.context import Context
from bardling.distributed.tensor import Gathered, Places, Tokens, padded
from bardling.model.divided import Split
from bardling.model.gpt import GPT
from bardling.model.layers import Embedding, Linear
from bardling.planning.parameter_shapes import matrix_rows

_ops: Any = torch.ops._c10d_functional


class _Exchange(torch.autograd.Function):
    """Of x [n, ...] each process gets the part with its number from all, in their order: [n, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens) -> Tensor:
        ctx.tokens, each = tokens, [1] * tokens.count
        parts: Tensor = _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), each, each, tokens.group))
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.tokens), None  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    """The sum of all processes' parts; the gradient of a part is the sum's, times n because FSDP2 takes the mean."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tokens) -> Tensor:
        ctx.count = tokens.count
        total: Tensor = _ops.wait_tensor(_ops.all_reduce(part, "sum", tokens.group))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.count, None


class _ToHeads(Linear):
    """c_attn: [B, t, C] -> [B, T, w], queries, keys and values of this process's heads."""

    tokens: Tokens
    split: Split

    def forward(self, x: Tensor) -> Tensor:
        y, count = padded(super().forward(x), self.tokens.per_process), self.tokens.count
        fractions = torch.stack([self.split.fraction(y, rank, count) for rank in range(count)])  # [n, B, t, w]
        shares: Tensor = _Exchange.apply(fractions, self.tokens)  # type: ignore[no-untyped-call]
        return shares.transpose(0, 1).flatten(1, 2)[:, : self.tokens.time]


class _ToTokens(Linear):
    """c_proj: [B, T, w] -> [B, t, C]."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        size, count = self.tokens.per_process, self.tokens.count
        shares = padded(x, size * count).unflatten(1, (count, size)).transpose(0, 1)  # type: ignore[no-untyped-call]
        heads: Tensor = _Exchange.apply(shares, self.tokens)  # type: ignore[no-untyped-call]  # [n, B, t, w]
        return super().forward(heads.permute(1, 2, 0, 3).flatten(2)[:, : self.tokens.own()[1]])


class _Words(Embedding):
    """The embedding of this process's tokens: [B, T] -> [B, t, C]."""

    tokens: Tokens

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        self.tokens.time = ids.size(1)
        return super().forward(ids.narrow(1, *self.tokens.own()), table)


def divide_tokens(model: GPT, context: Context) -> None:
    """Let a model on the meta device compute this process's tokens, in place."""
    group = context.group(("context",)) or dist.group.WORLD
    assert group is not None
    tokens = Tokens(group)
    kinds: list[tuple[Any, type[nn.Module]]] = [(model.transformer.wte, _Words)]
    if hasattr(model.transformer, "wpe"):
        kinds.append((model.transformer.wpe, Places))
    split = Split(2, tuple(matrix_rows(model.config)["attn.c_attn"].values()))
    for block in model.transformer.h.children():
        attention: Any = block.attn
        attention.heads = [heads // tokens.count for heads in attention.heads]
        attention.c_attn.split = split
        kinds += [(attention.c_attn, _ToHeads), (attention.c_proj, _ToTokens)]
    for module, kind in kinds:
        module.__class__, module.tokens = kind, tokens
    model.register_forward_pre_hook(partial(_own_targets, tokens), with_kwargs=True)
    model.register_forward_hook(partial(_joined, tokens), with_kwargs=True)


def _own_targets(tokens: Tokens, _: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments of a pass, with the targets of this process's tokens only."""
    ids, targets = args[0], args[1] if len(args) > 1 else named.get("targets")
    if targets is None:
        return args, dict(named)
    tokens.time = ids.size(1)
    return (ids,), {**named, "targets": targets.narrow(1, *tokens.own())}


def _joined(tokens: Tokens, _: nn.Module, __: object, named: Mapping[str, Any], found: Tensor) -> Tensor:
    """What all processes have found together."""
    output = named.get("output") or ("logits" if named.get("targets") is None else "loss")
    if output == "loss" and named.get("reduction", "sum") == "sum":
        return _Summed.apply(found, tokens)  # type: ignore[no-untyped-call,no-any-return]
    if output in ("logits", "hidden"):
        return Gathered.apply(found, tokens, tokens.count)  # type: ignore[no-untyped-call,no-any-return]
    columns = found.unsqueeze(-1) if output == "loss" else found.permute(1, 2, 0)  # [B, t, 1], or [B, t, 2] of scores
    whole: Tensor = Gathered.apply(columns, tokens, tokens.count)  # type: ignore[no-untyped-call]
    return whole.squeeze(-1) if output == "loss" else whole.permute(2, 0, 1)
