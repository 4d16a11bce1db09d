"""Attention on short contexts against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from bardling.model.attend import EXPLICIT_LENGTH, attend


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("time", [1, 7, 64])
def test_bfloat16_on_a_cpu_is_float32s_attention_to_its_rounding(heads, time):
    assert time <= EXPLICIT_LENGTH
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, count, time, 16, generator=random) for count in (heads[0], heads[1], heads[1]))
    narrow = [part.bfloat16().requires_grad_() for part in (q, k, v)]
    wide = [part.detach().float().requires_grad_() for part in narrow]
    found = attend(*narrow)
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    slope = torch.randn(expected.shape, generator=random)
    found.backward(slope.bfloat16())
    expected.backward(slope)
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=5e-2, atol=5e-2)


def test_the_future_has_no_influence():
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(3))
    before = attend(q, k, v)
    k[:, :, 5:], v[:, :, 5:] = 100.0, -100.0
    assert torch.equal(attend(q, k, v)[:, :, :5], before[:, :, :5])


def test_dropout_thins_the_weights_and_keeps_their_mean():
    q, k = torch.zeros(1, 1, 64, 8).bfloat16(), torch.zeros(1, 1, 64, 8).bfloat16()
    v = torch.ones(1, 1, 64, 8).bfloat16()
    torch.manual_seed(0)
    dropped = torch.stack([attend(q, k, v, dropout=0.5)[0, 0, -1, 0].float() for _ in range(200)])
    assert dropped.std() > 0.05
    assert abs(dropped.mean() - 1) < 0.1
