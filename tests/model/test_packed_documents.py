"""Packed documents: each has the loss and the gradients that it has alone, on every path on which attention is computed."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_options import OPTIONS, TINY, option, perturbed, relative, tokens
from torch import Tensor
from torch.nn.attention import varlen

from bardling.config import ModelConfig
from bardling.data.batches.packing import document_bounds
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT
from bardling.planning.activations import activation_bytes

START = 3
NAMES = ["gpt2", *OPTIONS]


def config(name: str) -> ModelConfig:
    """One of the options, or GPT-2."""
    return TINY if name == "gpt2" else option(name)


def packed(batch: int = 3, time: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and bounds of documents of many lengths, of one token too."""
    inputs = tokens(batch, time + 1)
    inputs[inputs == START] = START + 1
    for row, places in enumerate(([5, 6, 17], [0, 11], [2, 3, 4, 23])):
        inputs[row, places] = START
    return inputs[:, :-1].contiguous(), inputs[:, 1:].contiguous(), document_bounds(inputs[:, :-1] == START)


def alone(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Losses [B, T], each document computed by itself."""
    rows = []
    for row, wanted in zip(inputs, targets, strict=True):
        cuts = sorted({0, *(row == START).nonzero()[:, 0].tolist(), len(row)})
        spans = list(itertools.pairwise(cuts))
        rows.append(torch.cat([model(row[None, a:b], wanted[None, a:b], reduction="none")[0] for a, b in spans]))
    return torch.stack(rows)


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_packed_documents_is_that_of_each_alone(name: str) -> None:
    model = perturbed(config(name)).double()
    inputs, targets, bounds = packed()
    together = model(inputs, targets, reduction="none", documents=bounds)
    apart = alone(model, inputs, targets)
    assert relative(together, apart) < 1e-12
    empty_too = torch.cat([bounds, bounds[:4]]).sort().values  # documents without tokens, between others too
    assert torch.equal(model(inputs, targets, reduction="none", documents=empty_too), together)
    for one, two in zip(gradients(model, model(inputs, targets, documents=bounds)), gradients(model, apart.sum()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
    assert relative(model(inputs, targets, reduction="none"), apart) > 1e-3, "without, they see each other"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3_window", "window_blocks"])
def test_in_lower_precision_they_agree_to_rounding(name: str, precision: str) -> None:
    model = perturbed(config(name))
    inputs, targets, bounds = packed()
    narrow = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    with narrow, torch.no_grad():
        found = model(inputs, targets, reduction="none", documents=bounds)
        assert relative(found, alone(model, inputs, targets)) < (1e-5 if precision == "float32" else 2e-2)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """What the kernel computes, document by document: q [N, H, D], k and v [N, K, D]."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.dim() == 3
    assert enable_gqa == (q.size(1) != k.size(1))
    assert window_size[1] == 0
    out = torch.zeros_like(q)
    for a, b in itertools.pairwise(cu_q.tolist()):
        assert b - a <= max_q == max_k
        if a == b:
            continue
        near = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            near &= ~torch.ones(b - a, b - a, dtype=torch.bool).tril(-window_size[0] - 1)
        parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(*parts, attn_mask=near, enable_gqa=enable_gqa)
        out[a:b] = y[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_the_varlen_kernel_gets_equivalent_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(config(name)).double()
    inputs, targets, bounds = packed()
    expected = model(inputs, targets, reduction="none", documents=bounds)
    monkeypatch.setattr("bardling.model.document_masks.is_varlen", lambda *of: True)
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    for shares in (True, False):  # PyTorch 2.11's takes as many heads of keys as of queries only
        monkeypatch.setattr("bardling.model.kernels.attention._VARLEN_SHARES_HEADS", shares)
        assert relative(model(inputs, targets, reduction="none", documents=bounds), expected) < 1e-12


def test_the_kernel_is_for_cuda_in_16_bits_without_dropout() -> None:
    from bardling.planning.costs import is_varlen

    assert is_varlen("cuda", "bfloat16", 64, 0.0)
    assert is_varlen("cuda", "float16", 128, 0.0)
    for other in (("cpu", "bfloat16", 64, 0.0), ("mps", "float16", 64, 0.0), ("cuda", "float32", 64, 0.0)):
        assert not is_varlen(*other)
    assert not is_varlen("cuda", "bfloat16", 64, 0.1)
    assert not is_varlen("cuda", "bfloat16", 12, 0.0)


def test_recomputation_with_documents_is_bitwise_equal() -> None:
    inputs, targets, bounds = packed()
    found = []
    for recompute in (False, True):
        model = perturbed(dataclasses.replace(config("all"), dropout=0.1))
        model.recompute = recompute
        torch.manual_seed(3)
        found.append(gradients(model, model(inputs, targets, documents=bounds)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_compiles_without_a_graph_break_for_any_number_of_documents() -> None:
    model = perturbed(dataclasses.replace(config("qwen3_window"), n_layer=2, global_every=2))
    compiled = torch.compile(model, fullgraph=True)
    inputs, targets, bounds = packed()
    for more in (bounds, torch.cat([bounds, bounds[-1:].expand(9)])):
        loss, expected = compiled(inputs, targets, documents=more), model(inputs, targets, documents=bounds)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_with_documents_is_refused() -> None:
    model = perturbed(config("qwen3"))
    inputs, _, bounds = packed()
    with pytest.raises(ValueError, match="either a cache or documents"):
        model(inputs, cache=KVCache(model.config, 3), documents=bounds)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3_window", "window_blocks"])
def test_memory_of_masks_is_that_of_the_plan(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, held_bytes: Callable[..., int]
) -> None:
    monkeypatch.setattr("bardling.model.kernels.select.EXPLICIT_LENGTH", 0)
    monkeypatch.setattr("bardling.planning.activations.EXPLICIT_LENGTH", 0)
    model = perturbed(config(name))
    inputs, targets, bounds = packed()
    held = held_bytes(model, precision, inputs, targets, documents=bounds)
    options = {"precision": precision, "device_type": "cpu"}
    made = activation_bytes(config(name), 3, document_mask=True, **options).saved
    assert made - activation_bytes(config(name), 3, **options).saved > 3 * 24 * 16
    assert held == pytest.approx(made, rel=0.04)


def test_the_kernel_needs_no_mask() -> None:
    for precision, masked in (("bfloat16", False), ("float32", True)):
        with_it, without = (activation_bytes(TINY, 3, precision=precision, document_mask=on).saved for on in (True, False))
        assert with_it - without == 3 * 24 * (16 + (24 * 4 if masked else 0))
