"""Ten float32 training steps against a plain implementation of GPT-2's training: the same losses to 1e-5.

The reference uses nothing of the package and nothing of `torch.nn` or `torch.optim`: attention is a softmax over an explicit
mask, layer norm, GELU, cross-entropy, clipping, AdamW and the cosine schedule are arithmetic on tensors.
"""

import math

import pytest
import torch

from bardling.config import ModelConfig, OptimConfig, TrainConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.planning.batching import make_plan
from bardling.planning.schedules import learning_rate
from bardling.training.build import Assembly
from bardling.training.loop import fit
from bardling.training.objective import NextToken
from bardling.training.state import TrainState
from bardling.training.step import StepSettings

LAYERS, HEADS, WIDTH, TIME, VOCAB, BATCH, STEPS = 3, 4, 32, 24, 61, 6, 10
# Warm-up, decay, the end of the decay and clipping all take part in the ten steps.
OPTIM = OptimConfig(lr=2e-2, min_lr=2e-3, warmup_steps=3, decay_steps=9, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
CLIP = 0.3


def batches():
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (STEPS, BATCH, TIME + 1), generator=random)
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_logits(weights, tokens, gelu):
    def norm(x, name):
        centred = x - x.sum(-1, keepdim=True) / WIDTH
        y = centred / torch.sqrt((centred * centred).sum(-1, keepdim=True) / WIDTH + 1e-5) * weights[f"{name}.weight"]
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def activation(x):
        if gelu == "erf":
            return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    mask = torch.arange(TIME)[None, :] > torch.arange(TIME)[:, None]  # what lies ahead of a token
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"]
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(WIDTH, dim=-1)
        seen, size = [], WIDTH // HEADS
        for head in range(HEADS):
            q, k, v = (part[..., head * size : (head + 1) * size] for part in parts)
            scores = torch.where(mask, torch.tensor(-torch.inf), q @ k.mT / math.sqrt(size))
            shares = torch.exp(scores - scores.max(-1, keepdim=True).values)
            seen.append(shares / shares.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(seen, -1), f"{block}.attn.c_proj")
        x = x + linear(activation(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def reference_loss(weights, batch, gelu):
    logits = reference_logits(weights, batch.inputs, gelu)
    return (torch.logsumexp(logits, -1) - logits.gather(-1, batch.targets[..., None])[..., 0]).sum() / batch.targets.numel()


def reference_rate(step):
    if step < OPTIM.warmup_steps:
        return OPTIM.lr * (step + 1) / (OPTIM.warmup_steps + 1)
    if step > OPTIM.decay_steps:
        return OPTIM.min_lr
    share = (step - OPTIM.warmup_steps) / (OPTIM.decay_steps - OPTIM.warmup_steps)
    return OPTIM.min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (OPTIM.lr - OPTIM.min_lr)


def reference_training(weights, data, gelu):
    """Losses and gradient norms of each step; `weights` ends as the trained ones."""
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    (beta1, beta2), losses, norms = OPTIM.betas, [], []
    for step, batch in enumerate(data):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss = reference_loss(leaves, batch, gelu)
        loss.backward()
        norm = math.sqrt(sum(leaf.grad.double().square().sum().item() for leaf in leaves.values()))
        losses.append(loss.item())
        norms.append(norm)
        rate = reference_rate(step)
        for name, leaf in leaves.items():
            gradient = leaf.grad * min(1.0, CLIP / (norm + 1e-6))
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient * gradient
            unbiased = mean[name] / (1 - beta1 ** (step + 1))
            spread = torch.sqrt(square[name] / (1 - beta2 ** (step + 1))) + OPTIM.eps
            decay = OPTIM.weight_decay if weights[name].dim() >= 2 else 0.0
            weights[name] = weights[name] - rate * decay * weights[name] - rate * unbiased / spread
    return losses, norms


# --- the comparison --------------------------------------------------------------------------------------------------


def ours(bias, gelu, micro_batch):
    """The package's losses and gradient norms, and the weights before and after, padding left out."""
    model = GPT(ModelConfig(LAYERS, HEADS, WIDTH, TIME, VOCAB, bias=bias, gelu=gelu), seed=1)
    with torch.no_grad():  # wider than GPT-2 starts, so that nothing (the biases least of all) is near zero
        random = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
            if name.endswith("wte.weight"):
                parameter[VOCAB:] = 0.0

    def weights():
        found = {name: value.detach().clone() for name, value in model.named_parameters()}
        return {**found, "transformer.wte.weight": found["transformer.wte.weight"][:VOCAB]}

    start = weights()
    optimizer = build_optimizer(model.named_parameters(), OPTIM, torch.device("cpu"))
    plan = make_plan(TrainConfig(steps=STEPS, batch_size=BATCH, micro_batch=micro_batch), TIME, 1)
    parts = (
        Batch(*pair)
        for batch in batches()
        for pair in zip(batch.inputs.split(micro_batch), batch.targets.split(micro_batch), strict=True)
    )
    losses, norms = [], []

    def note(state, result):
        if result is not None:
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())

    rate = lambda step: learning_rate(step, OPTIM, STEPS)  # noqa: E731
    settings = StepSettings(NextToken(), Precision("float32", "test", "cpu"), SINGLE, grad_clip=CLIP)
    fit(Assembly(TrainState(model, optimizer), model), parts, plan, settings, lr_at=rate, hooks=[note])
    return losses, norms, start, weights()


@pytest.mark.parametrize("micro_batch", [6, 2, 1])
@pytest.mark.parametrize(("bias", "gelu"), [(True, "tanh"), (False, "tanh"), (False, "erf")])
def test_ten_steps_have_the_losses_of_the_reference(bias, gelu, micro_batch):
    losses, norms, weights, trained = ours(bias, gelu, micro_batch)
    assert any(name.endswith(".bias") for name in weights) is bias
    expected, expected_norms = reference_training(weights, batches(), gelu)
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert min(norms) > CLIP, "clipping takes part in every step"
    for name, value in trained.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=5e-4)


@pytest.mark.parametrize("change", ["gelu", "clip", "decay", "rate", "positions"])
def test_the_comparison_detects_small_errors(change, monkeypatch):
    losses, _, weights, _ = ours(True, "tanh", 6)
    gelu = "tanh"
    if change == "gelu":
        gelu = "erf"
    elif change == "clip":
        monkeypatch.setitem(globals(), "CLIP", 1e9)  # (Adam cannot see a factor that is the same in every step)
    elif change == "decay":
        monkeypatch.setitem(globals(), "OPTIM", OptimConfig(**{**vars(OPTIM), "weight_decay": 0.0}))
    elif change == "rate":
        monkeypatch.setitem(globals(), "OPTIM", OptimConfig(**{**vars(OPTIM), "warmup_steps": 2}))
    else:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].roll(1, 0)
    expected, _ = reference_training(weights, batches(), gelu)
    assert losses != pytest.approx(expected, rel=0, abs=1e-5)
