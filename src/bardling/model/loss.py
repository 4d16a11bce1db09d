"""The one place where hidden states become losses: head and cross-entropy, in chunks of tokens.

Full logits, [batch x time, vocabulary], are by far the largest tensor of a GPT's training step. Here they exist only for one
chunk of tokens at a time. For the summed loss the forward pass also makes the gradients with respect to the hidden states and
the head's weight while a chunk's logits are at hand (softmax minus one-hot, then two matrix products), so that nothing is
computed twice and the backward pass is one multiplication. That is possible because the gradient of a sum is known up to the
factor that arrives from above.

Numbers: matrix products take the autocast dtype when autocast is on, else the hidden states' own; softmax, loss and
the weight's gradient are float32 (float64 for float64 models).

Padding: rows of the weight from `vocab_size` on take no part. Their logits are set to minus infinity, so that their
probability, and with it their gradient, is exactly zero, while the matrix products keep the padded, faster shape.

Soft-capping (Gemma 2, arXiv:2408.00118): logits become cap * tanh(logits / cap), chunk by chunk; its slope is 1 - tanh^2.

Limits: per-token losses (`reduction="none"`) that need gradients keep full logits; they are for evaluation.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that has no loss, as in `torch.nn.functional.cross_entropy`."""

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Most bytes of a chunk's float32 logits, by device type; on a CPU, what the C library hands out again without asking the
system (`prepare_backend`)."""

SLOPE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Most bytes of the slopes of several chunks, in the dtype of the matrix products. Chunks share what they cause the weight's
gradient, which is large: with GPT-2's vocabulary on 2 CPU cores, adding each chunk to it took twice as long."""

_ROWS = 4096
"""Rows of the weight's gradient that a CPU adds to at a time, so that they are in its cache meanwhile."""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    reduction: Literal["sum", "none"] = "sum",
    softcap: float = 0.0,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against `targets` (nats).

    Args:
        hidden: [..., n_embd] final hidden states.
        weight: [rows, n_embd] head, rows >= vocab_size; rows from vocab_size on are padding.
        targets: [...] int64 ids below vocab_size, or -100 for positions without loss.
        vocab_size: number of real ids.
        reduction: "sum" for a scalar, "none" for a loss per position (0 where ignored).
        softcap: bound of the logits; 0 for none.

    Returns:
        float32 (float64 for float64 hidden states), a scalar or shaped as `targets`.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction = {reduction!r}: must be 'sum' or 'none'")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    flat, ids = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)  # [N, E], [N]
    grads = (flat.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    if not any(grads):
        losses = _losses(flat, weight, ids, vocab_size, dtype, softcap)
        return losses.sum() if reduction == "sum" else losses.view(targets.shape)
    if reduction == "sum":
        total: Tensor = _SummedLoss.apply(flat, weight, ids, vocab_size, dtype, grads, softcap)  # type: ignore[no-untyped-call]
        return total
    logits = (flat.to(dtype) @ weight[:vocab_size].to(dtype).t()).to(_wide(hidden.dtype))
    logits = soft_cap(logits, softcap)
    return F.cross_entropy(logits, ids, ignore_index=IGNORE, reduction="none").view(targets.shape)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap); the logits themselves for a cap of 0."""
    return logits if cap == 0 else torch.tanh(logits / cap) * cap


class _SummedLoss(torch.autograd.Function):
    """Summed loss whose forward pass makes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, E]
        weight: Tensor,  # [V, E]
        targets: Tensor,  # [N]
        vocab_size: int,
        dtype: torch.dtype,
        grads: tuple[bool, bool],
        softcap: float,
    ) -> Tensor:
        wide, device = _wide(hidden.dtype), hidden.device.type
        want_hidden, want_weight = grads
        with torch.autocast(device, enabled=False):
            rows = _used_rows(weight, vocab_size)
            head = weight[:rows].to(dtype)
            inputs = hidden.to(dtype)
            ids = targets.unsqueeze(1)  # [N, 1]
            counted = _counted(ids)
            if counted is not None:
                ids = ids.clamp_min(0)
                # Zero vectors add nothing to the weight's gradient, whatever their probabilities.
                inputs = inputs * counted
            total = torch.zeros((), dtype=wide, device=hidden.device)
            hidden_grads: list[Tensor] = []
            weight_grad = torch.zeros_like(weight, dtype=wide) if want_weight else None
            for group in _chunks(hidden.size(0), rows * dtype.itemsize, _limit(SLOPE_BYTES, device)):
                parts = _chunks(group.stop - group.start, rows * wide.itemsize, _limit(CHUNK_BYTES, device), group.start)
                slopes = None if len(parts) == 1 else inputs.new_empty(group.stop - group.start, rows)  # [G, V]
                for part in parts:
                    answer = ids[part]  # [C, 1]
                    logits, squashed = _logits(inputs[part], head, vocab_size, wide, softcap)
                    logp = F.log_softmax(logits, dim=1)  # [C, V]
                    found = logp.gather(1, answer)  # [C, 1]
                    total -= (found if counted is None else found * counted[part]).sum()
                    slope = logp.exp_().scatter_add_(1, answer, torch.full_like(found, -1.0))
                    if squashed is not None:
                        slope.mul_(squashed.square_().neg_().add_(1))  # 1 - tanh^2
                    if slopes is None:
                        slopes = slope.to(dtype)
                    else:
                        slopes[part.start - group.start : part.stop - group.start] = slope
                assert slopes is not None
                if want_hidden:
                    hidden_grads.append((slopes @ head).to(hidden.dtype))
                if weight_grad is not None:
                    _accumulate(weight_grad[:rows], slopes.t(), inputs[group])
            hidden_grad = _joined(hidden_grads) if want_hidden else None
            if hidden_grad is not None and counted is not None:
                hidden_grad *= counted
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        # Scaling in place spares the largest gradient a copy; autograd's version check turns a second backward pass into an
        # error.
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(above[0]) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None, None, None


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, softcap: float) -> Tensor:
    """Loss of each token [N], without gradients."""
    wide, out, device = _wide(hidden.dtype), [], hidden.device.type
    with torch.autocast(device, enabled=False):
        rows = _used_rows(weight, vocab_size)
        head = weight[:rows].to(dtype)
        for part in _chunks(hidden.size(0), rows * wide.itemsize, _limit(CHUNK_BYTES, device)):
            logits, _ = _logits(hidden[part].to(dtype), head, vocab_size, wide, softcap)
            out.append(F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="none"))
    return _joined(out)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _used_rows(weight: Tensor, vocab_size: int) -> int:
    """Rows of the head that are multiplied: a CPU gains nothing from padding."""
    return vocab_size if weight.device.type == "cpu" else weight.size(0)


def _counted(ids: Tensor) -> Tensor | None:
    """True where a target counts, [N, 1]; None when all do, where finding out does not make a device or a compiler wait."""
    counted = ids != IGNORE
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool(counted.all()):
        return None
    return counted


def _logits(hidden: Tensor, head: Tensor, vocab_size: int, wide: torch.dtype, softcap: float) -> tuple[Tensor, Tensor | None]:
    """[C, E] -> [C, V] in `wide`, minus infinity at padded ids; and with a cap, the tanh that made them."""
    logits, squashed = _matmul(hidden, head.t(), wide), None
    if softcap:
        squashed = logits.div_(softcap).tanh_()
        logits = squashed * softcap
    if head.size(0) > vocab_size:
        logits[:, vocab_size:] = -torch.inf
    return logits, squashed


def _matmul(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` in `wide`; on CUDA the product of narrow operands is never rounded to their dtype on the way."""
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=wide)
    return _product(a, b, wide).to(wide)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """`a @ b` of narrow operands, in their dtype where that has `wide`'s range."""
    if a.dtype == torch.float16:
        return a.to(wide) @ b.to(wide)  # sums over tokens can pass 65504, float16's largest number
    return a @ b


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu" and not torch.compiler.is_compiling():
        # In parts that are added while the processor's cache still has them.
        for rows in (slice(start, start + _ROWS) for start in range(0, total.size(0), _ROWS)):
            total[rows].add_(_product(a[rows], b, total.dtype))
    else:
        total.add_(_matmul(a, b, total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _limit(bytes_by_device: dict[str, int], device_type: str) -> int:
    return bytes_by_device.get(device_type, bytes_by_device["cpu"])


def _chunks(tokens: int, bytes_per_token: int, limit: int, first: int = 0) -> list[slice]:
    """Equal portions of `tokens` tokens from number `first` on, in multiples of 16, of at most `limit` bytes."""
    count = max(1, -(-tokens * bytes_per_token // limit))
    size = -(-tokens // (16 * count)) * 16 if count > 1 else max(tokens, 1)
    return [slice(first + start, first + min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]
