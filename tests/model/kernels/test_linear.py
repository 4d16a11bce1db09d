"""Each implementation of a linear layer against `F.linear`, and when each is selected."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from bardling.model.kernels import linear as linear_module
from bardling.model.kernels.linear import few_rows_linear, linear, recast_linear
from bardling.model.kernels.select import few_rows_kernel, linear_kernel
from bardling.planning.costs import RECAST_MIN_ELEMENTS


def problem(*rows, bias=True):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random) for shape in ((*rows, 24), (40, 24), (40,))[: 2 + bias]]


@pytest.mark.parametrize("kernel", ["mkl", "onednn"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_few_rows(batch, bias, kernel, monkeypatch):
    if kernel == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(linear_module, "few_rows_kernel", lambda _: kernel)
    x, weight, *rest = problem(batch, 1, bias=bias)
    torch.testing.assert_close(few_rows_linear(x, weight, rest[0] if bias else None), F.linear(x, weight, *rest))


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_in_bfloat16(bias):
    x, weight, *rest = (part.bfloat16() for part in problem(5, 1, bias=bias))
    found = few_rows_linear(x, weight, rest[0] if bias else None)
    expected = F.linear(x.double(), weight.double(), *(part.double() for part in rest))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (2, 3)])
def test_recasting_the_weight_changes_no_more_than_rounding(rows, bias):
    x, weight, *rest = (part.requires_grad_() for part in problem(*rows, bias=bias))
    inputs = (x, weight, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = recast_linear(x, weight, rest[0] if bias else None), F.linear(x, weight, *rest)
    assert torch.equal(ours, theirs)
    above = torch.randn(*rows, 40).bfloat16()
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, above), torch.autograd.grad(theirs, inputs, above), strict=True
    ):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)


LARGE = torch.empty(RECAST_MIN_ELEMENTS // 64, 64, device="meta")
SMALL = torch.empty(8, 64, device="meta")


@pytest.mark.parametrize(
    ("kernel", "shape", "weight", "settings"),
    [
        ("plain", (4, 16, 64), LARGE, {}),
        ("plain", (4, 16, 64), SMALL, {"autocast": True}),
        ("recast", (4, 16, 64), LARGE, {"autocast": True}),
        ("plain", (4, 16, 64), LARGE, {"autocast": True, "dtype": torch.float64}),
        ("plain", (4, 16, 64), LARGE, {"autocast": True, "grad": False}),
        ("fp8", (4, 16, 64), LARGE, {"autocast": True, "fp8": True}),
        ("plain", (4, 16, 64), LARGE, {"fp8": True, "grad": False}),
        ("few rows", (7, 1, 64), SMALL, {"grad": False}),
        ("few rows", (32, 1, 64), SMALL, {"grad": False, "fp8": True}),
        ("few rows", (4, 1, 64), SMALL, {"grad": False}),
        ("plain", (3, 1, 64), SMALL, {"grad": False}),
        ("few rows", (7, 1, 64), SMALL, {"grad": False, "without": "AVX512"}),
        ("plain", (6, 1, 64), SMALL, {"grad": False, "without": "AVX512"}),
        ("plain", (33, 1, 64), SMALL, {"grad": False}),
        ("plain", (7, 2, 64), SMALL, {"grad": False}),
        ("plain", (7, 64), SMALL, {"grad": False}),
        ("plain", (7, 1, 64), SMALL, {}),
        ("plain", (7, 1, 64), SMALL, {"grad": False, "autocast": True}),
        ("plain", (7, 1, 64), SMALL, {"grad": False, "dtype": torch.float64}),
        ("few rows", (1, 1, 64), SMALL, {"grad": False, "dtype": torch.bfloat16}),
        ("plain", (33, 1, 64), SMALL, {"grad": False, "dtype": torch.bfloat16}),
    ],
)
def test_selection_on_a_cpu(kernel, shape, weight, settings, monkeypatch):
    capability = "AVX2" if settings.get("without") == "AVX512" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    x = torch.zeros(shape, dtype=settings.get("dtype", torch.float32))
    narrow = torch.autocast("cpu", torch.bfloat16) if settings.get("autocast") else contextlib.nullcontext()
    with narrow, torch.set_grad_enabled(settings.get("grad", True)):
        assert linear_kernel(x, weight, settings.get("fp8", False)) == kernel


def test_few_rows_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert few_rows_kernel(torch.empty(4, 1, 8)) == "mkl"


def test_other_devices_use_pytorchs_own():
    x = torch.empty(7, 1, 64, device="meta")
    assert linear_kernel(x, LARGE, False) == "plain"
    with torch.no_grad():
        assert linear_kernel(x, SMALL, False) == "plain"


@torch.no_grad()
def test_linear_computes_with_what_is_selected():
    x, weight, bias = problem(9, 1)
    assert torch.equal(linear(x, weight, bias), few_rows_linear(x, weight, bias))
    x, weight, bias = problem(9, 2)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
