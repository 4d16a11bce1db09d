"""A step leaves every decision to the device, and a bad step changes nothing there.

Tensors on the meta device have shapes but no values: whatever reads one, or copies it to the host, raises. A step that goes
through there can make no host wait. What the same path computes is tested on a CPU, which has the flag too.
"""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.optim.optimizer as base
from torch.utils._python_dispatch import TorchDispatchMode

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer, row_splits
from bardling.optim.ema import Ema
from bardling.training.objective import NextToken
from bardling.training.recovery.spikes import Limits
from bardling.training.state import TrainState
from bardling.training.step import StepSettings, train_step

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8)
LLAMA = dataclasses.replace(MODEL, family="llama", n_kv_head=1, sliding_window=4, global_every=2, value_embeddings=1)
OPTIMIZERS = [OptimConfig(), OptimConfig(name="muon"), OptimConfig(name="muon", cautious_decay=True)]
TABLE = torch.arange(11)


def state(optim, device="cpu", model=MODEL, seed=0):
    with torch.device(device):
        net = GPT(model, seed=seed).train()
    made = TrainState(net, build_optimizer(net.named_parameters(), optim, torch.device("cuda"), splits=row_splits(model)))
    made.ema = Ema(dict(net.named_parameters()), 0.9)
    return made


def batch(seed, device="cpu", documents=False):
    tokens = torch.randint(11, (4, 13), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(device)
    bounds = torch.tensor([0, 5, 12, 20, 24, 36, 48], dtype=torch.int32, device=device) if documents else None
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), bounds)


def step(state, number=0, *, device="cpu", on_device=True, limits=None, documents=False):
    where = torch.device(device)
    result = train_step(
        state,
        [batch(2 * number, device, documents), batch(2 * number + 1, device, documents)],
        StepSettings(
            NextToken(TABLE.to(where)),
            Precision("float32", "test", device),
            dataclasses.replace(SINGLE, device=where),
            skip_on_device=on_device,
        ),
        forward=state.model,
        lr=1e-2,
        limits=limits or Limits(),
    )
    assert state.ema is not None
    state.ema.update(number)
    return result


@pytest.fixture
def meta(monkeypatch):
    """Treat the meta device as one with fused kernels and autocast, like CUDA."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **options: contextlib.nullcontext() if kind == "meta" else autocast(kind, **options)
    )
    known = base._get_fused_kernels_supported_devices()
    monkeypatch.setattr(base, "_get_fused_kernels_supported_devices", lambda: [*known, "meta"])


@pytest.mark.parametrize("model", [MODEL, LLAMA])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_step_reads_no_value_from_the_device(meta, optim, documents, model):
    ours = state(optim, "meta", model)
    for number in range(2):  # in the second, momenta are there
        result = step(ours, number, device="meta", documents=documents)
    assert result.bad.is_meta
    assert ours.optimizer.state


def test_reading_a_value_would_be_detected(meta):
    with pytest.raises(RuntimeError, match="meta"):
        step(state(OPTIMIZERS[1], "meta"), device="meta", on_device=False)


def everything(state):
    """Weights, EMA and optimizer state."""
    values = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    values |= {f"{name} mean": mean.clone() for name, mean in state.ema.tensors().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            values[f"{name} {key}"] = value.clone()
    return values


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_decisions_of_device_and_host_are_bitwise_equal(optim):
    device, host = state(optim), state(optim)
    for number in range(6):
        limits = Limits(loss=0.0) if number in (2, 3) else Limits()
        bad = [step(ours, number, on_device=how, limits=limits).bad.item() for ours, how in ((device, True), (host, False))]
        assert bad == [number in (2, 3)] * 2
        assert_equal(everything(device), everything(host))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_nonfinite_gradients_change_nothing(optim):
    ours = state(optim)
    for number in range(2):
        step(ours, number)
    ours.ema.update = lambda number: None  # the EMA also counts steps that leave the weights unchanged
    before = everything(ours)
    weight = ours.model.transformer.h[0].mlp.c_fc.weight
    for value in (float("nan"), float("inf")):
        handle = weight.register_hook(lambda gradient, value=value: gradient.index_fill(0, torch.tensor([1]), value))
        assert step(ours, 2).bad.item() == 1
        handle.remove()
        assert_equal(everything(ours), before)
    assert step(ours, 2).bad.item() == 0
    assert not torch.equal(weight, before["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_bad_first_step_does_not_affect_later_steps(optim):
    ours, other = state(optim), state(optim)
    ours.ema = other.ema = Ema(dict(ours.model.named_parameters()), 0.0)
    step(ours, 0, limits=Limits(grad_norm=0.0))
    for number in range(1, 3):
        step(ours, number)
        step(other, number)
    assert_equal(everything(ours), everything(other))


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unscaled", [True, False])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_gradient_scaler_skips_updates_without_a_sync(optim, unscaled):
    ours, plain = state(optim), state(optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaler.scale(torch.ones(()))  # makes its tensors
    for number in range(3):
        before = everything(ours)
        for one, scale in ((ours, 2.0**10), (plain, 1.0)):
            random = torch.Generator().manual_seed(number)
            for parameter in one.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random) * scale
            if number == 1 and one is ours:
                one.model.transformer.h[1].attn.c_proj.weight.grad[0, 0] = float("inf")
        with Reads() as reads:
            if unscaled:
                scaler.unscale_(ours.optimizer)
            scaler.step(ours.optimizer)
            scaler.update()
        assert reads.count == 0
        if number == 1:
            assert_equal(everything(ours), before)
            assert scaler.get_scale() == 2.0**9
            scaler.update(2.0**10)
        else:
            plain.optimizer.step()
    assert_equal(everything(ours), everything(plain))


def test_the_host_decides_for_optimizers_without_the_flag():
    ours = state(OptimConfig())
    ours.optimizer = torch.optim.SGD(ours.model.parameters(), lr=1e-2)
    before = copy.deepcopy(ours.model.state_dict())
    assert step(ours, limits=Limits(loss=0.0)).bad.item() == 1
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
