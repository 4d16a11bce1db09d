"""Norms and nonlinearities written for a CPU against their plain references: values and gradients."""

import pytest
import torch

from bardling.model.kernels import elementwise
from bardling.model.kernels.elementwise import plain_rms_norm, plain_squared_relu, plain_swiglu, rms_norm, squared_relu, swiglu

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def assert_equal(ours, plain, inputs, tolerance):
    """Values and gradients of a function in its dtype are those of the reference in float64, to rounding."""
    wide = [part.detach().double().requires_grad_() for part in inputs]
    found, expected = ours(*inputs), plain(*wide)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mine = (found, *torch.autograd.grad(found, inputs, slope.to(found.dtype)))
    theirs = (expected, *torch.autograd.grad(expected, wide, slope))
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == found.dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


def draw(*shape, dtype):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("weight", [None, (24,), (7, 24)])
def test_rms_norm(weight, dtype, tolerance):
    inputs = [draw(5, 7, 24, dtype=dtype), *([] if weight is None else [draw(*weight, dtype=dtype)])]
    functions = (lambda x, weight=None, norm=norm: norm(x, weight, 1e-3) for norm in (rms_norm, plain_rms_norm))
    assert_equal(*functions, inputs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("ours", "plain"), [(swiglu, plain_swiglu), (squared_relu, plain_squared_relu)])
def test_nonlinearities(ours, plain, dtype, tolerance):
    assert_equal(ours, plain, [draw(5, 7, 24, dtype=dtype)], tolerance)


def test_other_devices_use_the_plain_ones(monkeypatch):
    monkeypatch.setattr(elementwise, "is_eager_cpu", lambda x: False)
    x = draw(3, 8, dtype=torch.float32)
    assert torch.equal(rms_norm(x, None, 1e-5), plain_rms_norm(x, None, 1e-5))
    assert torch.equal(swiglu(x), plain_swiglu(x))
