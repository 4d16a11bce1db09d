"""Linear layers with int8 weights against float64, and when each implementation is selected."""

import pytest
import torch

from bardling.model.kernels import int8
from bardling.model.kernels.int8 import Int8Weight, int8_linear, quantize, reference_int8_linear
from bardling.model.kernels.select import int8_kernel

needs_onednn = pytest.mark.skipif(int8_kernel(torch.empty(0)) != "onednn", reason="this CPU has no instructions for int8")


MAGNITUDES = torch.arange(96.0).roll(40)


def problem(rows=(3, 1), inputs=96, outputs=40):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((*rows, inputs), (outputs, inputs), (outputs,)))
    x[..., 5] *= 100  # one channel stands out, as in trained models
    return x, weight, bias


def unpacked(monkeypatch, weight, magnitudes) -> Int8Weight:
    with monkeypatch.context() as patch:
        patch.setattr(int8, "int8_kernel", lambda _: "dequantized")
        return quantize(weight, magnitudes)


def test_rounding_is_at_most_half_a_step_of_the_row(monkeypatch):
    _, weight, _ = problem()
    weight[7] = 0
    found = unpacked(monkeypatch, weight, MAGNITUDES)
    assert (found.values.dtype, found.values.shape, found.twice.numel()) == (torch.int8, (40, 96 + 6), 6)
    assert found.values[:, :96].abs().amax(dim=1).tolist() == [127] * 7 + [0] + [127] * 32
    error = (reference_int8_linear(torch.eye(96), found).T - weight).abs() / found.scale[:, None]
    assert bool((error <= 0.5001).all())
    assert bool((error[:, found.twice] <= 0.5001 / 254 + 1e-4).all())


def test_large_activations_meet_finer_weights(monkeypatch):
    x, weight, _ = problem((64,))
    expected = x @ weight.T
    errors = [
        float((reference_int8_linear(x, unpacked(monkeypatch, weight, magnitudes)) - expected).norm())
        for magnitudes in (MAGNITUDES.flip(0), x.square().mean(dim=0).sqrt())
    ]
    assert errors[1] < 0.3 * errors[0]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (9, 1), (2, 30), (5,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_the_kernel_computes_what_the_reference_does(monkeypatch, rows, bias, dtype):
    x, weight, offset = problem(rows)
    packed, plain = quantize(weight, MAGNITUDES), unpacked(monkeypatch, weight, MAGNITUDES)
    assert packed.zeros is not None
    x = x.to(dtype)
    found = int8_linear(x, packed, offset if bias else None)
    expected = reference_int8_linear(x.double(), plain, offset if bias else None)
    assert (found.dtype, found.shape) == (dtype, (*rows, 40))
    step = float(x.abs().max()) / 127 / 254  # of an activation
    weights = (plain.values.float() * plain.scale[:, None]).abs().sum(dim=1).max()
    rounding = float(expected.abs().max()) * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-4
    assert float((found.double() - expected).abs().max()) <= 0.5 * step * float(weights) + rounding


@needs_onednn
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias = problem((8, 1))
    packed = quantize(weight, MAGNITUDES)
    together = int8_linear(x, packed, bias)
    for row in range(8):
        assert torch.equal(int8_linear(x[row : row + 1], packed, bias)[0], together[row])


@needs_onednn
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@torch.no_grad()
def test_activations_that_are_not_finite_stay_visible(fault):
    x, weight, bias = problem((2, 1))
    x[0, 0, 3] = fault
    y = int8_linear(x, quantize(weight, MAGNITUDES), bias)
    assert not bool(torch.isfinite(y[0]).any())
    assert bool(torch.isfinite(y[1]).all())


@torch.no_grad()
def test_a_row_of_zeros():
    _, weight, bias = problem()
    assert torch.equal(int8_linear(torch.zeros(1, 96), quantize(weight, MAGNITUDES), bias), bias[None])


def test_the_reference_is_selected_by_what_the_weights_are(monkeypatch):
    x, weight, bias = problem()
    plain = unpacked(monkeypatch, weight, MAGNITUDES)
    assert torch.equal(int8_linear(x, plain, bias), reference_int8_linear(x, plain, bias))
    assert int8_kernel(torch.empty(0, device="meta")) == "dequantized"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert int8_kernel(torch.empty(0)) == "dequantized"
