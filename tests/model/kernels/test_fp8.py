"""Linear layers in float8 against float32: the rounding of the formats, and nothing else."""

import dataclasses

import pytest
import torch
from torch import nn

from bardling.config import ModelConfig, RunConfig
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.model.kernels.fp8 import E4M3, E5M2, fp8_linear, product, quantize
from bardling.model.layers import use_fp8
from bardling.planning.activations import activation_bytes
from bardling.planning.costs import fp8_fraction, fp8_layers
from bardling.planning.devices import peak_flops
from bardling.planning.parameter_shapes import block_matrices

MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=200)
LLAMA = dataclasses.replace(MODEL, family="llama", n_kv_head=2, mlp_hidden=96)
RELU2 = dataclasses.replace(MODEL, family="custom", mlp="relu2")


def apart(found, expected):
    """Relative distance of two tensors."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def tokens(seed=0):
    return torch.randint(200, (3, 32), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_rounding_is_half_a_step_of_the_mantissa(dtype, bits, size):
    torch.manual_seed(0)
    x = torch.randn(64, 64) * size
    numbers, scale = quantize(x, dtype)
    back = numbers.float() * scale
    assert numbers.float().abs().max() == torch.finfo(dtype).max
    large = x.abs() > x.abs().max() / 256  # smaller ones are subnormal in e4m3
    assert ((back - x).abs() / x.abs())[large].max() <= 2.0 ** -(bits + 1) * 1.0001


def test_zeros_stay_zeros_and_non_finite_inputs_make_the_result_nan():
    numbers, scale = quantize(torch.zeros(4, 4), E4M3)
    assert (numbers.float() * scale).eq(0).all()
    for wrong in (float("nan"), float("inf")):
        x = torch.ones(16, 16)
        x[3, 5] = wrong
        y = fp8_linear(x, torch.ones(16, 16), None)
        assert y.isnan().any()


@pytest.mark.parametrize(("a", "b"), [(E4M3, E4M3), (E5M2, E4M3)])
def test_products_elsewhere_are_those_of_pytorchs_kernel(a, b):
    torch.manual_seed(0)
    (x, x_scale), (y, y_scale) = quantize(torch.randn(32, 16), a), quantize(torch.randn(48, 16), b)
    reference = torch._scaled_mm(x, y.t(), scale_a=x_scale, scale_b=y_scale, out_dtype=torch.float32)
    torch.testing.assert_close(product(x, x_scale, y, y_scale, torch.float32), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(2, 32), (3, 7), (5,)])  # 64, 21 and 5 tokens
def test_forward_and_gradients_against_float32(rows):
    torch.manual_seed(0)
    x, slope = torch.randn(*rows, 96, requires_grad=True), torch.randn(*rows, 48)
    layer = nn.Linear(96, 48)
    inputs = (x, layer.weight, layer.bias)
    y = layer(x)
    expected = torch.autograd.grad(y, inputs, slope)
    found = fp8_linear(x, layer.weight, layer.bias)
    gradients = torch.autograd.grad(found, inputs, slope)
    assert found.dtype == torch.float32
    assert found.shape == y.shape
    # Rounding to n bits of mantissa has a relative error of 2^-(n + 1) / sqrt(3) or less, uniformly spread: 0.036 for e4m3,
    # 0.072 for e5m2. Two independent ones add as squares.
    assert 0.01 < apart(found, y) < 0.055
    assert [0.01 < apart(one, other) < 0.085 for one, other in zip(gradients[:2], expected[:2], strict=True)] == [True] * 2
    torch.testing.assert_close(gradients[2], expected[2])  # the bias takes no part


@pytest.mark.parametrize("config", [MODEL, LLAMA, RELU2])
def test_a_model_in_float8_is_near_the_one_in_bfloat16(config):
    plain, model = GPT(config, seed=1), GPT(config, seed=1)
    use_fp8(model.transformer.h)
    losses = []
    for net in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(tokens(), tokens(1), reduction="sum")
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, parameter in plain.named_parameters():
        other = dict(model.named_parameters())[name].grad
        assert other.dtype == torch.float32
        assert apart(other, parameter.grad) < 0.25, name
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_passes_without_gradients_do_not_use_float8():
    plain, model = GPT(MODEL, seed=1), GPT(MODEL, seed=1)
    use_fp8(model.transformer.h)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(tokens()), model(tokens()))
    use_fp8(model.transformer.h, False)
    assert torch.equal(plain(tokens(), tokens(1)), model(tokens(), tokens(1)))


def test_it_learns_as_bfloat16_does():
    ends = []
    for wanted in (False, True):
        model = GPT(dataclasses.replace(MODEL, n_layer=1), seed=1)
        use_fp8(model.transformer.h, wanted)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(tokens(), tokens(1), reduction="sum") / 96
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    assert ends[0] < 3.5 < 5.3
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize("config", [MODEL, LLAMA, dataclasses.replace(MODEL, mlp_hidden=100, n_kv_head=1, head_dim=12)])
def test_float8_layers_are_those_of_the_plan(config):
    model = GPT(config, seed=None)
    use_fp8(model.transformer.h)
    taken, left = fp8_layers(config)
    linear = {n: m.fp8 for n, m in model.transformer.h[1].named_modules() if isinstance(m, nn.Linear)}
    assert linear == dict.fromkeys(taken, True) | dict.fromkeys(left, False)
    modules = dict(model.transformer.h[0].named_modules())
    assert block_matrices(config) == {n: (modules[n].in_features, modules[n].out_features) for n in linear}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [MODEL, dataclasses.replace(MODEL, mlp_hidden=100)])
def test_saved_activations_match_autograd_to_the_byte(config, bias, monkeypatch, held_bytes):
    monkeypatch.setattr("bardling.model.kernels.select.EXPLICIT_LENGTH", 0)  # the fused kernel, as on a GPU
    config = dataclasses.replace(config, bias=bias)
    model = GPT(config)
    use_fp8(model.transformer.h)
    assert held_bytes(model, "bfloat16", tokens(), tokens(1)) == activation_bytes(config, 3, fp8=True).saved


def test_the_peak_is_that_of_both_formats_together():
    model = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
    part = fp8_fraction(model)
    assert 0.5 < part < 0.7
    assert peak_flops("NVIDIA H200", "bfloat16", fp8=model) == pytest.approx(1e12 / (part / 1979 + (1 - part) / 989))
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16", fp8=model) is None
    odd = dataclasses.replace(model, n_embd=90, n_head=9, mlp_hidden=100)
    assert fp8_fraction(odd) == 0
    assert peak_flops("NVIDIA H200", "bfloat16", fp8=odd) == pytest.approx(989e12)


def test_other_formats_are_refused_beside_it():
    assert RunConfig(fp8=True, precision="bfloat16").fp8
    with pytest.raises(UserError, match=r"fp8 = True with precision = 'float16'.*leave one of them out"):
        RunConfig(fp8=True, precision="float16")


@pytest.mark.slow
def test_compiled_agrees():
    found = []
    for compiled in (False, True):
        model = GPT(MODEL, seed=1)
        use_fp8(model.transformer.h)
        forward = torch.compile(model) if compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(tokens(), tokens(1), reduction="sum")
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert apart(other, one) < 0.2
