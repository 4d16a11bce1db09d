"""Attention against its textbook formula and against PyTorch's kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bardling.config import ModelConfig
from bardling.model.document_masks import additive_mask, make_documents
from bardling.model.kernels.attention import attention, expand_heads, reference_attention, within_window
from bardling.planning.costs import EXPLICIT_BLOCK, EXPLICIT_LENGTH, attention_weights_kept


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("time", "window"), [(24, None), (24, 30), (24, 4), (24, 7), (1, 3), (200, None)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_way_of_computing_attention_equals_the_reference(dtype, tolerance, documents, time, window, kv_heads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, time, 8, generator=random, dtype=torch.float64).to(dtype) for n in (4, kv_heads, kv_heads))
    positions = torch.arange(time)
    visible = within_window(positions[:, None], positions, window or time)[None, None]
    masks = None
    if documents:
        bounds = torch.tensor([0, *(n for n in (1, 5, time, time + 3) if n < 2 * time), 2 * time], dtype=torch.int32).unique()
        numbers = (torch.searchsorted(bounds, torch.arange(2 * time), right=True)).view(2, time)
        visible = visible & (numbers[:, :, None] == numbers[:, None])[:, None]
        config = ModelConfig(n_layer=1, n_head=4, n_embd=32, block_size=time, sliding_window=window, global_every=0)
        masks = make_documents(bounds.int(), 2, time, config.architecture, dtype, dropout=0.0)
    narrow = [part.requires_grad_() for part in (q, k, v)]
    wide = [part.detach().double().requires_grad_() for part in narrow]
    found, expected = attention(*narrow, window=window, documents=masks), reference_attention(*wide, visible)
    slope = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    ours = (found, *torch.autograd.grad(found, narrow, slope.to(dtype)))
    theirs = (expected, *torch.autograd.grad(expected, wide, slope))
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - reference).norm() <= tolerance * (1 + reference.norm())


def assert_same(found, expected, narrow, wide):
    """bfloat16's result and the gradients of its inputs are float32's, to rounding."""
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    found.backward(slope.bfloat16())
    expected.backward(slope)
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("time", [1, 7, 64, EXPLICIT_BLOCK, 200, 300])
def test_bfloat16_on_a_cpu_is_float32s_attention_to_its_rounding(heads, time):
    assert time <= EXPLICIT_LENGTH
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, count, time, 16, generator=random) for count in (heads[0], heads[1], heads[1]))
    narrow = [part.bfloat16().requires_grad_() for part in (q, k, v)]
    wide = [part.detach().float().requires_grad_() for part in narrow]
    found = attention(*narrow)
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    assert_same(found, expected, narrow, wide)


def test_the_future_has_no_influence():
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(3))
    before = attention(q, k, v)
    k[:, :, 5:], v[:, :, 5:] = 100.0, -100.0
    assert torch.equal(attention(q, k, v)[:, :, :5], before[:, :, :5])


def test_dropout_thins_the_weights_and_keeps_their_mean():
    q, k = torch.zeros(1, 1, 64, 8).bfloat16(), torch.zeros(1, 1, 64, 8).bfloat16()
    v = torch.ones(1, 1, 64, 8).bfloat16()
    torch.manual_seed(0)
    dropped = torch.stack([attention(q, k, v, dropout=0.5)[0, 0, -1, 0].float() for _ in range(200)])
    assert dropped.std() > 0.05
    assert abs(dropped.mean() - 1) < 0.1


def test_blocks_leave_out_later_keys():
    assert attention_weights_kept(EXPLICIT_BLOCK) == EXPLICIT_BLOCK**2
    assert attention_weights_kept(2 * EXPLICIT_BLOCK + 3) == EXPLICIT_BLOCK**2 * 3 + 3 * (2 * EXPLICIT_BLOCK + 3)
    assert attention_weights_kept(200, masked=True) == 200**2


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("time", [9, 200])
def test_a_mask_applies_to_each_row_of_the_batch(heads, time):
    random = torch.Generator().manual_seed(1)
    seen = torch.rand(3, 1, time, time, generator=random) < 0.3
    seen |= torch.eye(time, dtype=torch.bool)  # queries see later keys too
    narrow = [torch.randn(3, n, time, 16, generator=random).bfloat16().requires_grad_() for n in (2, heads, heads)]
    wide = [part.detach().float().requires_grad_() for part in narrow]
    found = attention(*narrow, mask=additive_mask(seen, torch.bfloat16))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
    assert_same(found, expected, narrow, wide)


@pytest.mark.parametrize("time", [16, 150])
def test_gradients_through_dropout_are_those_of_the_weights_that_were_drawn(time):
    """With the masks known, attention is linear in the values: the same seed gives the same masks."""
    random = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, time, time, generator=random).bfloat16().requires_grad_() for _ in range(3))

    def drawn():
        torch.manual_seed(3)
        return attention(q, k, v, dropout=0.5)

    eye = torch.eye(time).bfloat16().expand(2, 2, -1, -1)
    torch.manual_seed(3)
    weights = attention(q, k, eye, dropout=0.5).detach().float()  # as values give back the weights
    slope = torch.randn(2, 2, time, time, generator=random)
    found = drawn()
    torch.testing.assert_close(found.float(), weights @ v.detach().float(), rtol=2e-2, atol=2e-2)
    found.backward(slope.bfloat16())
    torch.testing.assert_close(v.grad.float(), weights.transpose(2, 3) @ slope, rtol=5e-2, atol=5e-2)
    scores = [part.detach().float().requires_grad_() for part in (q, k)]
    softmax = (
        (scores[0] @ scores[1].transpose(2, 3) / time**0.5)
        .masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    kept = torch.where(softmax > 0, weights / softmax.detach().clamp_min(1e-30), 0).round()  # 0 or 2
    ((softmax * kept) @ v.detach().float()).backward(slope)
    for ours, theirs in zip((q, k), scores, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=5e-2, atol=5e-2)


def test_a_bias_cached_in_inference_mode_works_in_training():
    with torch.inference_mode():
        attention(*(torch.randn(1, 1, 21, 8).bfloat16() for _ in range(3)))
    q, k, v = (torch.randn(1, 1, 21, 8).bfloat16().requires_grad_() for _ in range(3))
    attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(("dtype", "masked", "heads"), [("bfloat16", False, 2), ("bfloat16", True, 4), ("float32", False, 4)])
def test_on_cuda_heads_are_shared_only_by_kernels_that_can(dtype, masked, heads, monkeypatch):
    # Tensors without memory stand in for a GPU's: what the kernel would be given is seen by its shape.
    seen = []

    def kernel(q, k, v, **options):
        seen.append((q.size(1), k.size(1), v.size(1), options["enable_gqa"]))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with FakeTensorMode():
        q, k, v = (torch.zeros(2, count, 16, 8, dtype=getattr(torch, dtype), device="cuda") for count in (4, 2, 2))
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool, device="cuda") if masked else None
        attention(q, k, v, mask=mask, causal=not masked)
    assert seen == [(4, heads, heads, heads == 2)]


def test_expanded_heads_are_those_that_are_shared():
    x = torch.randn(2, 3, 5, 4)
    assert expand_heads(x, 3) is x
    assert torch.equal(expand_heads(x, 6), x[:, [0, 0, 1, 1, 2, 2]])
