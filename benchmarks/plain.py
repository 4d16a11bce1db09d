"""A plain training loop: GPT-2 and its training step in the simplest form, as a baseline for the library.

It shares no code with the library: full logits, `F.cross_entropy`, one tensor after the other. By default it is eager, in
float32, with PyTorch's AdamW and its defaults, which is what nanoGPT does on a CPU. `fast` makes it what nanoGPT is on a GPU:
bfloat16 autocast, `torch.compile`, fused AdamW, the vocabulary rounded up to 64 (both use scaled-dot-product attention).
Parameters have GPT-2's names, so that both implementations can start from the same weights.

Shapes: B batch, T time, C width, H heads, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Norm(nn.Module):
    """Layer norm with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.c_attn(x).view(batch, time, 3, self.heads, width // self.heads)  # [B, T, 3, H, C / H]
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each [B, H, T, C / H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class _MLP(nn.Module):
    def __init__(self, width: int, bias: bool, gelu: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU("tanh" if gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, gelu: str) -> None:
        super().__init__()
        self.ln_1, self.attn = _Norm(width, bias), _Attention(width, heads, bias)
        self.ln_2, self.mlp = _Norm(width, bias), _MLP(width, bias, gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2; `forward` returns the mean loss (nats)."""

    def __init__(self, shape: dict[str, Any], vocab_rows: int) -> None:
        super().__init__()
        width, bias = shape["n_embd"], shape["bias"]
        blocks = (_Block(width, shape["n_head"], bias, shape["gelu"]) for _ in range(shape["n_layer"]))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_rows, width),
                "wpe": nn.Embedding(shape["block_size"], width),
                "h": nn.ModuleList(blocks),
                "ln_f": _Norm(width, bias),
            }
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.size(1), device=tokens.device))  # [B, T, C]
        for block in parts["h"]:
            x = block(x)
        logits = F.linear(parts["ln_f"](x), parts["wte"].weight)  # [B, T, V]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def make_adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """AdamW with nanoGPT's two groups: weight decay for tensors of two or more dimensions only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, **options)


def plain_steps(
    forward: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    accumulation: int,
    rate: Callable[[int], float],
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> Iterator[Tensor]:
    """Train indefinitely; yield the mean loss of each step after it.

    Args:
        forward: (tokens, targets) -> mean loss; `model`, or its compiled form.
    """
    step = 0
    while True:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        total = 0.0
        for _ in range(accumulation):
            tokens, targets = next(batches)
            with autocast():
                loss = forward(tokens, targets) / accumulation
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield total
