"""Recomputed activations: bitwise equal results, with the memory and FLOPs of the plan."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from test_options import OPTIONS, option, perturbed, tokens
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bardling.config import ModelConfig
from bardling.model.gpt import GPT
from bardling.model.layers import use_fp8
from bardling.planning.activations import activation_bytes
from bardling.planning.costs import recomputed_flops_per_token


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def loss_and_gradients(
    config: ModelConfig, recompute: bool, precision: str = "float32", compiled: bool = False
) -> list[Tensor]:
    model = perturbed(config)
    model.recompute = recompute
    forward = torch.compile(model) if compiled else model
    torch.manual_seed(5)
    with autocast(precision):
        loss = forward(tokens(), tokens(seed=1))
    loss.backward()
    assert torch.isfinite(loss)
    return [loss.detach(), torch.rand(1), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["gqa", "values", "llama", "qwen3_window", "window_blocks", "all"])
def test_loss_gradients_and_later_random_numbers_are_bitwise_equal(name: str, dropout: float, precision: str) -> None:
    config = dataclasses.replace(option(name), dropout=dropout)
    kept, again = (loss_and_gradients(config, recompute, precision) for recompute in (False, True))
    assert len(kept) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    if dropout:
        other = loss_and_gradients(dataclasses.replace(config, dropout=0.0), True, precision)
        assert not torch.equal(other[0], again[0]), "the masks play a part"


def test_compiled_recomputation_agrees_to_rounding() -> None:
    config = dataclasses.replace(option("gqa"), n_layer=1)
    kept, again = loss_and_gradients(config, False), loss_and_gradients(config, True, compiled=True)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-5)


def test_inference_and_caches_are_unchanged() -> None:
    from bardling.model.cache import KVCache

    model = perturbed(option("qwen3")).eval()
    with torch.no_grad():
        before = model(tokens())
        model.recompute = True
        assert torch.equal(model(tokens()), before)
        cached = model(tokens(), cache=KVCache(model.config, 3))
    torch.testing.assert_close(cached, before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIONS)
def test_flops_are_one_more_forward_pass_through_the_blocks(name: str, dropout: float) -> None:
    config = dataclasses.replace(option(name), dropout=dropout)
    found = []
    for recompute in (False, True):
        model = perturbed(config)
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens(), tokens(seed=1)).backward()
        found.append(counter.get_total_flops())
    assert found[1] - found[0] == pytest.approx(3 * 24 * recomputed_flops_per_token(config), rel=1e-3)


LARGE = ModelConfig(n_layer=2, n_head=4, n_embd=256, block_size=24, vocab_size=75, bias=False)  # copies are made again


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [option("gqa"), option("swiglu"), option("relu2"), LARGE])
def test_a_last_product_that_saves_after_running_is_recomputed(config: ModelConfig, precision: str, fp8: bool) -> None:
    found = []
    for recompute in (False, True):
        model = GPT(config)
        use_fp8(model.transformer.h, fp8)
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            with autocast(precision):
                loss = model(tokens(batch=2), tokens(batch=2, seed=1))
            loss.backward()
        found.append(counter.get_total_flops())
    planned = recomputed_flops_per_token(config, precision=precision, device_type="cpu", fp8=fp8)
    assert found[1] - found[0] == pytest.approx(2 * 24 * planned, rel=1e-3)


def compiled_flops(config: ModelConfig, fp8: bool, recompute: bool) -> int:
    """FLOPs of the products in the compiled transformer, forward and backward."""
    found = []

    def count(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                found.append(2 * node.meta["val"].numel() * node.args[0].meta["val"].size(-1))
            elif node.target in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default):
                found.append(2 * node.meta["val"].numel() * node.args[1].meta["val"].size(-1))
        return make_boxed_func(graph.forward)

    model = GPT(config)
    use_fp8(model.transformer.h, fp8)
    model.recompute = recompute
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    body = torch.compile(model.transformer, backend=backend, dynamic=False)
    with autocast("bfloat16"):
        loss = model(tokens(batch=2), tokens(batch=2, seed=1), transformer=body)
    loss.backward()
    return sum(found)


def test_compiled_code_recomputes_the_last_product_of_the_last_block() -> None:
    config = dataclasses.replace(option("gqa"), n_layer=2)
    found = compiled_flops(config, True, True) - compiled_flops(config, True, False)
    planned = recomputed_flops_per_token(config, device_type="cpu", fp8=True, compiled=True)
    assert found == pytest.approx(2 * 24 * planned, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_saved_bytes_are_those_that_autograd_holds(name: str, precision: str, held_bytes: Callable[..., int]) -> None:
    model = perturbed(option(name))
    model.recompute = True
    inputs = tokens(batch=8)
    held = held_bytes(model, precision, inputs, inputs)
    saved = activation_bytes(option(name), 8, precision=precision, device_type="cpu", recompute="blocks").saved
    if model.transformer.architecture.positions == "rotary":  # the tables are held as arguments, which the hooks do not see
        held += 2 * 24 * model.transformer.architecture.head_dim * (4 if precision == "float32" else 2)
    assert held == pytest.approx(saved, rel=0.01)


def _has_storage(value: object) -> bool:
    """Whether it is a tensor with memory of its own; a sparse one is made of others."""
    return isinstance(value, Tensor) and not value.is_sparse


class _Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most: what operators made, not what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if _has_storage(tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.alive += size
                weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.alive)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak(config: ModelConfig, batch: int, precision: str, recompute: bool) -> int:
    """Most bytes alive in a forward and backward pass, besides weights and their gradients."""
    model = GPT(config)
    model.recompute = recompute
    inputs = torch.randint(0, 200, (batch, config.block_size))
    for _ in range(2):  # gradients are there from the first pass on
        with _Peak() as found:
            with autocast(precision):
                loss = model(inputs, inputs)
            loss.backward()
            del loss
    return found.most


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_peak_memory_is_near_the_estimate_and_far_below_that_without_recomputation(family: str, precision: str) -> None:
    config = ModelConfig(
        n_layer=8,
        n_head=4,
        n_embd=64,
        block_size=64,
        vocab_size=200,
        family=family,
        bias=False,  # type: ignore[arg-type]
    )
    made = activation_bytes(config, 8, precision=precision, device_type="cpu", recompute="blocks")
    found = peak(config, 8, precision, recompute=True)
    assert found == pytest.approx(made.total, rel=0.08)
    assert found < 0.5 * peak(config, 8, precision, recompute=False)
