"""Tensor and sequence parallelism: each process of a tensor group computes a fraction of every layer.

`divide` replaces the parameters that `model/divided.py` lists by this process's fractions of them, plain and smaller tensors.
The model's kernels run as they are, with communication at the borders of layers:

    word embedding          looks up the ids that it has; sums over processes, each of which keeps a share of the tokens
    c_attn, c_fc            gather all tokens first, then compute a fraction of the outputs: heads, hidden channels
    c_proj                  multiplies a fraction of the inputs; sums as the word embedding does, then adds the bias
    final norm              gathers all tokens
    head and loss           have a fraction of the vocabulary: see `VocabularyShard`

The residual stream, norms and dropout are thus computed for a share of the tokens in each process (sequence parallelism,
Korthikanti et al. 2022, arXiv:2205.05198): consecutive ones, ceil(T / n) for each of n processes, so the last may have fewer or
none, as in generation. The gradient of a gathering is a scattered sum and vice versa. The sums are in the precision of the
products. Gradients of parameters that are not divided are partial sums, which `Shards.collect_gradients` adds up.

The model consists of plain local tensors, not of DTensors: a fused matrix, whose parts are divided one by one, is no DTensor
of its whole, and neither are the loss in chunks and the cache of keys and values.

Limits: no float8, adapters or int8 weights. Shapes: B batch, T tokens, t a share of them, C channels, V ids of a share.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.distributed.context import Context
from bardling.model.divided import Split
from bardling.model.gpt import GPT
from bardling.model.kernels.head_loss import VocabularyShard
from bardling.model.kernels.linear import linear
from bardling.model.kernels.select import product_dtype
from bardling.model.layers import Embedding, Linear

_ops: Any = torch.ops._c10d_functional  # collectives that can be compiled


class _Gather(torch.autograd.Function):
    """[B, t, C] of each of `count` processes -> [B, count * t, C]; the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, group: str) -> Tensor:
        ctx.settings = count, group
        return _all_gather(x, count, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], *ctx.settings), None, None


class _Scatter(torch.autograd.Function):
    """The sum of the processes' x [B, count * t, C], of which each gets its [B, t, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, group: str) -> Tensor:
        ctx.settings = count, group
        return _reduce_scatter(x, count, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], *ctx.settings), None, None


def _all_gather(x: Tensor, count: int, group: str) -> Tensor:
    whole: Tensor = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), count, group))  # [count * B, t, C]
    return whole.unflatten(0, (count, x.size(0))).transpose(0, 1).flatten(1, 2)  # type: ignore[no-untyped-call,no-any-return]


def _reduce_scatter(x: Tensor, count: int, group: str) -> Tensor:
    shares = x.unflatten(1, (count, x.size(1) // count)).transpose(0, 1)  # type: ignore[no-untyped-call]  # [count, B, t, C]
    result: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(shares.flatten(0, 1).contiguous(), "sum", count, group))
    return result


class Tokens:
    """The tokens of the pass being computed, and which of them are this process's."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.count = group.group_name, dist.get_rank(group), dist.get_world_size(group)
        self.time = 0  # T; set by the word embedding, which comes first

    @property
    def per_process(self) -> int:
        return -(-self.time // self.count)

    def own(self) -> tuple[int, int]:
        """The first token of this process's share, and their number."""
        first, last = (min(rank * self.per_process, self.time) for rank in (self.rank, self.rank + 1))
        return first, last - first

    def gather(self, x: Tensor) -> Tensor:
        """[B, t, C] -> [B, T, C]; the gradients of all processes are added up."""
        whole: Tensor = _Gather.apply(padded(x, self.per_process), self.count, self.group)  # type: ignore[no-untyped-call]
        return whole[:, : self.time]

    def scatter(self, x: Tensor) -> Tensor:
        """The sum over the processes of x [B, T, C], of which each gets its share [B, t, C]."""
        whole = padded(x, self.per_process * self.count)
        summed: Tensor = _Scatter.apply(whole, self.count, self.group)  # type: ignore[no-untyped-call]
        return summed[:, : self.own()[1]]


def padded(x: Tensor, time: int) -> Tensor:
    return x if x.size(1) == time else F.pad(x, (0, 0, 0, time - x.size(1)))


class Gathered(torch.autograd.Function):
    """All tokens, for computations that are the same in all processes: the gradient is the own share, not a sum, times
    `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens, factor: int) -> Tensor:
        ctx.own, ctx.factor = tokens.own(), factor
        return tokens.gather(x).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(1, *ctx.own) * ctx.factor, None, None


class _Wide(Linear):
    """A fraction of the outputs of a linear layer, for all tokens: [B, t, C] -> [B, T, outputs]."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.tokens.gather(x.to(product_dtype(x))))


class _Summed(Linear):
    """A linear layer with a fraction of the inputs: [B, T, inputs] -> [B, t, C]."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens.scatter(linear(x, self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Words(Embedding):
    """An embedding with a fraction of the ids: [B, T] -> [B, t, C]."""

    tokens: Tokens

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        self.tokens.time = ids.size(1)
        rows = self.weight.size(0)
        local = ids - self.tokens.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = super().forward(local.masked_fill(elsewhere, 0), table)
        return self.tokens.scatter(found.masked_fill(elsewhere.unsqueeze(-1), 0))


class Places(Embedding):
    """Learned positions of this process's tokens: [T] or [B, T] -> [t, C] or [B, t, C]."""

    tokens: Tokens

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        return super().forward(ids.narrow(-1, *self.tokens.own()), table)


def divide(model: GPT, context: Context, splits: dict[str, Split]) -> None:
    """Turn a model on the meta device into this process's fraction of it, in place."""
    group = context.group(("tensor",)) or dist.group.WORLD
    assert group is not None
    tokens = Tokens(group)
    for name, split in splits.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shape = list(getattr(module, attribute).shape)
        shape[split.dim] //= tokens.count
        setattr(module, attribute, nn.Parameter(torch.empty(shape, device="meta")))
    for module, kind in _borders(model, splits):
        module.__class__, module.tokens = kind, tokens
    for block in model.transformer.h.children():
        attention: Any = block.attn
        attention.heads = [heads // tokens.count for heads in attention.heads]
    gathered: Any = Gathered.apply
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: gathered(output, tokens, 1))
    model.vocabulary = vocabulary_shard(group, model.head_weight.size(0))


def _borders(model: GPT, splits: dict[str, Split]) -> Iterator[tuple[Any, type[nn.Module]]]:
    """The modules that communicate, and what they become."""
    for name, split in splits.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias") or module is getattr(model, "lm_head", None):
            continue
        if isinstance(module, Linear):
            yield module, _Wide if split.dim == 0 else _Summed
        elif split.dim == 0:
            yield module, _Words
    if hasattr(model.transformer, "wpe"):
        yield model.transformer.wpe, Places


class _Entered(torch.autograd.Function):
    """Hidden states as each process uses them in a way of its own: their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduced(grads[0].clone(), dist.ReduceOp.SUM, ctx.group), None


class _Joined(torch.autograd.Function):
    """Logits [..., V] of all processes side by side."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.first, ctx.size = dist.get_rank(group) * logits.size(-1), logits.size(-1)
        pieces = [torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, logits.contiguous(), group=group)
        return torch.cat(pieces, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, ctx.first, ctx.size), None


def _reduced(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, op=op, group=group)
    return tensor


def vocabulary_shard(group: dist.ProcessGroup, rows: int) -> VocabularyShard:
    """A range of `rows` rows of the head for each process of a group, in order."""
    return VocabularyShard(
        first=dist.get_rank(group) * rows,
        all_max=lambda tensor: _reduced(tensor, dist.ReduceOp.MAX, group),
        all_sum=lambda tensor: _reduced(tensor, dist.ReduceOp.SUM, group),
        enter=functools.partial(_apply, _Entered, group),
        join=functools.partial(_apply, _Joined, group),
    )


def _apply(function: Any, how: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    result: Tensor = function.apply(tensor, how)
    return result
