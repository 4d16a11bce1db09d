"""Linear layers with int8 weights against float64, and when each implementation is selected."""

import pytest
import torch

from bardling.model.kernels.int8 import int8_linear, quantize, reference_int8_linear
from bardling.model.kernels.select import has_int8_kernel, int8_kernel

needs_kernel = pytest.mark.skipif(not has_int8_kernel(), reason="this CPU has no fast kernel for int8")


MAGNITUDES = torch.arange(96.0).roll(40)


def problem(rows=(3, 1), inputs=96, outputs=41):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((*rows, inputs), (outputs, inputs), (outputs,)))
    x[..., 5] *= 100  # one channel stands out, as in trained models
    return x.bfloat16(), weight, bias.bfloat16()


def test_rounding_is_at_most_half_a_step_of_the_row():
    _, weight, _ = problem()
    weight[7] = 0
    found = quantize(weight, MAGNITUDES)
    assert (found.values.dtype, found.scale.dtype, found.factors.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert found.values.abs().amax(dim=1).tolist() == [127] * 7 + [0] + [127] * 33
    error = (reference_int8_linear(torch.eye(96), found).T - weight).abs() / (found.scale[:, None] * found.factors)
    assert bool((error <= 0.5001).all())


def test_large_activations_meet_finer_weights():
    x, weight, _ = problem((64,))
    x = x.float()
    expected = x @ weight.T
    errors = [
        float((reference_int8_linear(x, quantize(weight, magnitudes)) - expected).norm())
        for magnitudes in (torch.ones(96), x.square().mean(dim=0).sqrt())
    ]
    assert errors[1] < 0.6 * errors[0]


def test_channels_without_activations():
    _, weight, _ = problem()
    for magnitudes in (torch.zeros(96), torch.eye(96)[3]):
        found = reference_int8_linear(torch.eye(96), quantize(weight, magnitudes)).T
        assert bool(torch.isfinite(found).all())
        assert float((found[:, 3] - weight[:, 3]).abs().max()) < 0.05


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (9, 1), (2, 14), (5,), ()])
@torch.no_grad()
def test_the_kernel_computes_what_the_reference_does(rows, bias):
    x, weight, offset = problem(rows)
    rounded = quantize(weight, MAGNITUDES)
    assert int8_kernel(x) == "fused"
    found = int8_linear(x, rounded, offset if bias else None)
    expected = reference_int8_linear(x.double(), rounded, offset if bias else None)
    assert (found.dtype, found.shape) == (torch.bfloat16, (*rows, 41))
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


@needs_kernel
@torch.no_grad()
def test_rows_that_are_not_in_memory_order():
    x, weight, bias = problem((4, 6))
    rounded = quantize(weight, MAGNITUDES)
    assert torch.equal(int8_linear(x.transpose(0, 1), rounded, bias), int8_linear(x, rounded, bias).transpose(0, 1))


@needs_kernel
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias = problem((8, 1))
    rounded = quantize(weight, MAGNITUDES)
    together = int8_linear(x, rounded, bias)
    for row in range(8):
        assert torch.equal(int8_linear(x[row : row + 1], rounded, bias)[0], together[row])


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


@pytest.mark.parametrize(
    ("kernel", "shape", "capability"),
    [
        ("fused", (28, 1, 96), "AVX512"),
        ("dequantized", (29, 1, 96), "AVX512"),  # many rows
        ("dequantized", (1, 1, 95), "AVX512"),  # the kernel would read beyond the end
        ("dequantized", (1, 1, 96), "AVX2"),
    ],
)
def test_selection(kernel, shape, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert int8_kernel(torch.empty(shape)) == kernel
    assert int8_kernel(torch.empty(shape, device="meta")) == "dequantized"


@torch.no_grad()
def test_other_widths_use_the_reference():
    x, weight, bias = problem((3, 1), inputs=90)
    rounded = quantize(weight, MAGNITUDES[:90])
    assert torch.equal(int8_linear(x, rounded, bias), reference_int8_linear(x, rounded, bias))
