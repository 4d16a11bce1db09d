"""The one place where hidden states become losses: head and cross-entropy, in chunks of tokens.

Full logits, [batch x time, vocabulary], are by far the largest tensor of a GPT's training step. Here they exist for one chunk
of tokens at a time. For the summed loss, the forward pass also computes the gradients with respect to the hidden states and the
head's weight while a chunk's logits are at hand (softmax minus one-hot, then two matrix products): the gradient of a sum is
known up to the factor that arrives from above, so the backward pass is one multiplication.

Precision: matrix products use the autocast dtype if autocast is on, else that of the hidden states; softmax, loss and the
weight's gradient are float32 (float64 for float64 models). Logits of the padding rows of the weight are set to minus infinity,
so that their gradient is exactly zero, while the products keep the padded, faster shape. Soft-capping (Gemma 2,
arXiv:2408.00118): logits become cap * tanh(logits / cap), chunk by chunk; the slope is 1 - tanh^2.

With a `VocabularyShard`, each of several processes has a range of the vocabulary's rows and computes their logits only. Maxima,
sums of exponentials and the targets' logits are combined in two small reductions for each chunk; all processes get the loss.

Limits: per-token losses (`reduction="none"`) with gradients need full logits; they are for evaluation.

Shapes: N tokens in all, G in a group of chunks, P in a chunk ("part"), C = n_embd, V rows of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.data.batches import IGNORE
from bardling.model.kernels.int8 import Int8Weight, int8_linear
from bardling.model.kernels.linear import linear
from bardling.model.kernels.select import has_wide_products, head_rows, is_eager_cpu, product_dtype
from bardling.planning.activations import LOGIT_CHUNK_BYTES as CHUNK_BYTES
from bardling.planning.activations import LOGIT_GRAD_BYTES as SLOPE_BYTES

_ROWS = 4096  # of the weight's gradient that a CPU adds to at a time, so that they stay in its cache


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head that this process has, where equal ranges of them are divided among several. The functions are
    collective; processes pass tensors of the same shape, which may be overwritten."""

    first: int  # the id of the first row
    all_max: Callable[[Tensor], Tensor]  # elementwise over the processes
    all_sum: Callable[[Tensor], Tensor]
    enter: Callable[[Tensor], Tensor]  # hidden states, unchanged; their gradients are summed over the processes
    join: Callable[[Tensor], Tensor]  # logits [..., V] of each process -> of all, [..., processes * V], in order

    def vocabulary(self, size: int, rows: int) -> int:
        """How many of this process's rows belong to a vocabulary of the given size."""
        return min(max(size - self.first, 0), rows)

    def place(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The row of each id, and whether this process has it; otherwise the row is any."""
        local = ids - self.first
        return local.clamp(0, rows - 1), (local >= 0) & (local < rows)


def head_loss(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    targets: Tensor,
    *,
    vocab_size: int,
    reduction: Literal["sum", "none"] = "sum",
    softcap: float = 0.0,
    tally: Tensor | None = None,
    greedy: bool = False,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against `targets` (nats).

    Args:
        hidden: [..., n_embd] final hidden states. weight: [rows, n_embd] head, whose rows from vocab_size on are padding;
            or int8 weights without padding, for inference.
        targets: [...] int64 ids below vocab_size, or -100 for positions without loss.
        reduction: "sum" for a scalar, "none" for a loss per position (0 where ignored).
        softcap: bound of the logits; 0 for none.
        tally: [vocab_size] bool, the ids whose loss a sum also states separately, without a gradient.
        greedy: also state, as 1 or 0, whether each target is the likeliest token; without gradients.
        shard: which rows of the head `weight` is, if not all.

    Returns:
        float32 (float64 for float64 hidden states), a scalar or shaped as `targets`; with a tally, both sums [2]; with
        `greedy`, both values of each target [2, ...].
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction = {reduction!r}: must be 'sum' or 'none'")
    dtype = product_dtype(hidden)
    flat, ids = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)  # [N, C], [N]
    grads = (False, False)
    if torch.is_grad_enabled() and isinstance(weight, Tensor):
        grads = flat.requires_grad, weight.requires_grad
    if greedy and (any(grads) or reduction == "sum"):
        raise ValueError("greedy: needs reduction = 'none' and torch.no_grad()")
    if isinstance(weight, Int8Weight) or not any(grads):
        losses = _chunked_loss(flat, weight, ids, vocab_size, dtype, softcap, greedy, shard)
    elif reduction == "sum":
        if is_eager_cpu(ids) and not bool((counted := ids != IGNORE).all()):  # compute no logits where none are needed
            places = _first_counted(counted)
            hidden, ids = flat.index_select(0, places), ids[places]
        return _SummedLoss.apply(hidden, weight, ids, vocab_size, dtype, grads, softcap, tally, shard)  # type: ignore[no-untyped-call,no-any-return]
    else:
        losses = full_logits_loss(flat, weight, ids, vocab_size=vocab_size, dtype=dtype, softcap=softcap, shard=shard)
    if reduction == "none":
        return losses.view((*losses.shape[:-1], *targets.shape))
    return losses.sum() if tally is None else torch.stack([losses.sum(), losses[tally[ids.clamp_min(0)]].sum()])


def head_logits(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    *,
    vocab_size: int,
    softcap: float = 0.0,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Logits [..., vocab_size] of hidden states [..., C], without padding's: float32 (float64 for float64 hidden states)."""
    if isinstance(weight, Int8Weight):
        logits = int8_linear(hidden, weight)
    elif shard is None:
        logits = linear(hidden, weight[:vocab_size])
    else:
        logits = shard.join(linear(shard.enter(hidden), weight))[..., :vocab_size]
    return soft_cap(logits.to(_wide(logits.dtype)), softcap)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap); the logits themselves for a cap of 0."""
    return logits if cap == 0 else torch.tanh(logits / cap) * cap


def full_logits_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    softcap: float = 0.0,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """The reference: loss of each token [N] from full logits, with products in `dtype`."""
    if shard is None:
        logits = hidden.to(dtype) @ weight[:vocab_size].to(dtype).t()  # [N, V]
    else:
        logits = shard.join(shard.enter(hidden).to(dtype) @ weight.to(dtype).t())[:, :vocab_size]
    logits = logits.to(_wide(hidden.dtype))
    return F.cross_entropy(soft_cap(logits, softcap), targets, ignore_index=IGNORE, reduction="none")


def _chunked_loss(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    softcap: float,
    greedy: bool,
    shard: VocabularyShard | None,
) -> Tensor:
    """Loss of each token [N], without gradients; with `greedy`, and whether it is the likeliest [2, N]."""
    wide, losses = _wide(hidden.dtype), []
    if is_eager_cpu(targets) and not bool((counted := targets != IGNORE).all()):  # compute no logits where none are needed
        found = _chunked_loss(hidden[counted], weight, targets[counted], vocab_size, dtype, softcap, greedy, shard)
        every = found.new_zeros(*found.shape[:-1], targets.numel())
        every[..., counted] = found
        return every
    with torch.autocast(hidden.device.type, enabled=False):
        known, rows, size = _rows(weight, vocab_size, shard)
        head = weight if isinstance(weight, Int8Weight) else weight[:rows].to(dtype)  # [V, C]
        for part in _chunks(hidden.size(0), size * wide.itemsize, _limit(CHUNK_BYTES, hidden)):
            if isinstance(head, Int8Weight):
                product = int8_linear(hidden[part], head).to(wide)
            else:
                product = _matmul(hidden[part].to(dtype), head.t(), wide)
            logits, _ = _capped(product, known, softcap)  # [P, V]
            best = _likeliest(logits, shard) if greedy else None  # [P]
            if shard is None:
                loss = F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="none")
            else:
                _, found = _log_softmax(logits, targets[part].clamp_min(0).unsqueeze(1), shard)
                loss = torch.where(targets[part] == IGNORE, 0, -found.squeeze(1))
            losses.append(loss if best is None else torch.stack([loss, (best == targets[part]).to(wide)]))
    return torch.cat(losses, dim=-1)


class _SummedLoss(torch.autograd.Function):
    """Summed loss whose forward pass computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [..., C]
        weight: Tensor,  # [rows, C]
        targets: Tensor,  # [N]
        vocab_size: int,
        dtype: torch.dtype,
        grads: tuple[bool, bool],
        softcap: float,
        tally: Tensor | None,
        shard: VocabularyShard | None,
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        hidden_needs_grad, weight_needs_grad = grads
        with torch.autocast(hidden.device.type, enabled=False):
            known, rows, size = _rows(weight, vocab_size, shard)
            head = weight[:rows].to(dtype)  # [V, C]
            # Cast before flattening: compiled code computes a cast of another shape than that of the last norm in a loop of its
            # own in the norm's kernel. From 1025 channels on, that loop reads values which other threads have yet to write
            # (pytorch/pytorch#190519).
            inputs = hidden.to(dtype).reshape(-1, hidden.size(-1))  # [N, C]
            ids = targets.unsqueeze(1)  # [N, 1]
            counted = _counted(ids)
            if counted is not None:
                ids = ids.clamp_min(0)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            tallied = torch.zeros_like(total)
            hidden_grads: list[Tensor] = []
            weight_grad = torch.zeros_like(weight, dtype=wide) if weight_needs_grad else None
            for group in _chunks(inputs.size(0), size * dtype.itemsize, _limit(SLOPE_BYTES, hidden)):
                parts = _chunks(group.stop - group.start, size * wide.itemsize, _limit(CHUNK_BYTES, hidden), group.start)
                slopes = inputs.new_empty(group.stop - group.start, rows) if len(parts) > 1 else None  # [G, V]
                for part in parts:
                    logits, squashed = _capped(_training_logits(inputs[part], head, wide), known, softcap)
                    logp, found = _log_softmax(logits, ids[part], shard)  # [P, V], [P, 1]
                    # Not in place: the gradients of an output modified in place are zero in code compiled by PyTorch 2.11.
                    total = total - (found if counted is None else found * counted[part]).sum()
                    if tally is not None:
                        kept = tally[ids[part]] if counted is None else tally[ids[part]] & counted[part]
                        tallied = tallied - torch.where(kept, found, 0).sum()
                    slope = _softmax_minus_one_hot(logp, ids[part], shard)  # d loss / d logits
                    if squashed is not None:
                        slope.mul_(squashed.square_().neg_().add_(1))  # 1 - tanh^2
                    if counted is not None:
                        slope.mul_(counted[part])  # in place, so that a chunk needs no third tensor of its size
                    if slopes is None:
                        slopes = slope.to(dtype)
                    else:
                        slopes[part.start - group.start : part.stop - group.start] = slope
                assert slopes is not None
                if hidden_needs_grad:
                    hidden_grads.append((slopes @ head).to(hidden.dtype))
                if weight_grad is not None:
                    _accumulate(weight_grad[:rows], slopes.t(), inputs[group])
            hidden_grad = _concatenated(hidden_grads).view(hidden.shape) if hidden_needs_grad else None
            if hidden_grad is not None and shard is not None:
                hidden_grad = shard.all_sum(hidden_grad)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total if tally is None else torch.stack([total, tallied])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope = grads[0].flatten()[0]  # of the sum of all losses: a tally has no gradient
        # Scaling in place saves a copy of the largest gradient; autograd's version check makes a second backward pass an error.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(slope) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, *(None,) * 7


def _first_counted(counted: Tensor) -> Tensor:
    """The places of tokens that count, and of some others, so that there are a multiple of an eighth of all tokens. Memory of a
    few sizes is used again, while that of any size would leave gaps."""
    unit = -(-counted.numel() // 8)
    kept = -(-int(counted.sum()) // unit) * unit
    return counted.logical_not().to(torch.uint8).argsort(stable=True)[:kept].sort().values


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _counted(ids: Tensor) -> Tensor | None:
    """True where a target counts, [N, 1]; None if all do and finding out does not make a device or a compiler wait."""
    counted = ids != IGNORE
    return None if is_eager_cpu(ids) and bool(counted.all()) else counted


def _training_logits(inputs: Tensor, head: Tensor, wide: torch.dtype) -> Tensor:
    """[P, C] -> [P, V] in `wide`. bfloat16 products are rounded to bfloat16, which halves the memory traffic."""
    return (inputs @ head.t()).to(wide) if inputs.dtype == torch.bfloat16 else _matmul(inputs, head.t(), wide)


def _rows(weight: Tensor | Int8Weight, vocab_size: int, shard: VocabularyShard | None) -> tuple[int, int, int]:
    """How many rows of `weight` are not padding, how many are multiplied, and for how many a chunk has to have room."""
    if isinstance(weight, Int8Weight):
        return vocab_size, vocab_size, vocab_size
    known = vocab_size if shard is None else shard.vocabulary(vocab_size, weight.size(0))
    rows = max(head_rows(weight, known), 1)
    return known, rows, rows if shard is None else weight.size(0)  # processes must have the same chunks


def _log_softmax(logits: Tensor, ids: Tensor, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities [P, V], and those of `ids` [P, 1]. Those of a shard overwrite its logits."""
    if shard is None:
        logp = F.log_softmax(logits, dim=1)
        return logp, logp.gather(1, ids)
    logits.sub_(shard.all_max(logits.amax(1, keepdim=True)))
    rows, here = shard.place(ids, logits.size(1))
    found = torch.where(here, logits.gather(1, rows), 0)
    sums = shard.all_sum(torch.cat([logits.exp().sum(1, keepdim=True), found], dim=1))
    total = sums[:, :1].log()
    return logits.sub_(total), sums[:, 1:] - total


def _likeliest(logits: Tensor, shard: VocabularyShard | None) -> Tensor:
    """The id of the largest logit [P]; of several equal ones the first."""
    if shard is None:
        return logits.argmax(1)
    largest, rows = logits.max(1)
    candidates = torch.where(largest == shard.all_max(largest.clone()), rows + shard.first, torch.iinfo(rows.dtype).max)
    return -shard.all_max(-candidates)


def _capped(logits: Tensor, vocab_size: int, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Logits [P, V], overwritten: with the cap, and minus infinity at padded ids. With a cap, also the tanh."""
    squashed = None
    if softcap:
        squashed = logits.div_(softcap).tanh_()
        logits = squashed * softcap
    if logits.size(1) > vocab_size:
        logits[:, vocab_size:] = -torch.inf
    return logits, squashed


def _softmax_minus_one_hot(logp: Tensor, ids: Tensor, shard: VocabularyShard | None) -> Tensor:
    """exp(logp) [P, V], overwritten, minus 1 at `ids` [P, 1]. Compiled code compares ids, which needs no pass of its own."""
    if shard is not None:
        rows, here = shard.place(ids, logp.size(1))
        return logp.exp_().scatter_add_(1, rows, -here.to(logp.dtype))
    if torch.compiler.is_compiling():
        hit = torch.arange(logp.size(1), device=logp.device) == ids  # [P, V]
        return torch.where(hit, logp.exp() - 1, logp.exp())
    return logp.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=logp.dtype))


def _matmul(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` in `wide`, without rounding in between where the device allows it."""
    if a.dtype != wide and has_wide_products(a):
        return torch.mm(a, b, out_dtype=wide)
    return _narrow_matmul(a, b, wide).to(wide)


def _narrow_matmul(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` of 16-bit operands, in their dtype if it has the range of `wide`: float16 sums over tokens can exceed 65504."""
    return a.to(wide) @ b.to(wide) if a.dtype == torch.float16 else a @ b


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif is_eager_cpu(a):
        for start in range(0, total.size(0), _ROWS):
            rows = slice(start, start + _ROWS)
            total[rows].add_(_narrow_matmul(a[rows], b, total.dtype))
    else:
        total.add_(_matmul(a, b, total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _limit(bytes_by_device: dict[str, int], x: Tensor) -> int:
    return bytes_by_device.get(x.device.type, bytes_by_device["cpu"])


def _chunks(tokens: int, bytes_per_token: int, limit: int, first: int = 0) -> list[slice]:
    """Equal portions of `tokens` tokens from number `first` on, in multiples of 16, of at most `limit` bytes."""
    count = max(1, -(-tokens * bytes_per_token // limit))
    size = -(-tokens // (16 * count)) * 16 if count > 1 else max(tokens, 1)
    return [slice(first + start, first + min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]
