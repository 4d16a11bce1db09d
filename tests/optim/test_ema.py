"""The EMA of the weights: the recurrence in float64, saving and loading."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from bardling.errors import UserError
from bardling.optim.ema import Ema


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_is_the_recurrence():
    model = net()
    ema = Ema(dict(model.named_parameters()), 0.3)
    wanted = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(8):
        move(model, step)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = {name: decay * wanted[name] + (1 - decay) * p.detach().double() for name, p in model.named_parameters()}
    for name, mean in ema.tensors().items():
        torch.testing.assert_close(mean.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_goes_on_to_the_bit():
    model = net()
    ema = Ema(dict(model.named_parameters()), 0.9)
    for step in range(4):
        move(model, step)
        ema.update(step)
    other = net(1)
    again = Ema(dict(other.named_parameters()), 0.9)
    other.load_state_dict(model.state_dict())
    again.load_tensors(load(save(ema.tensors())))
    for step in range(4, 9):
        for each, mean in ((model, ema), (other, again)):
            move(each, step)
            mean.update(step)
    assert all(torch.equal(mean, again.tensors()[name]) for name, mean in ema.tensors().items())


def test_weights_come_back_to_the_bit_even_after_an_error():
    model = net()
    ema = Ema(dict(model.named_parameters()), 0.9)
    move(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def use() -> None:
        with ema.applied():
            assert all(torch.equal(p, ema.tensors()[name]) for name, p in model.named_parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(before["0.weight"], ema.tensors()["0.weight"])


def test_small_steps_of_bfloat16_weights_are_not_lost():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, 0.999)
    with torch.no_grad():
        parameter.fill_(1.0078125)
    for step in range(100_000, 100_100):
        ema.update(step)
    assert ema.tensors()["w"].dtype == torch.float32
    assert 1.0007 < ema.tensors()["w"][0] < 1.0008


def test_means_of_another_model_are_refused_and_change_nothing():
    model = net()
    ema = Ema(dict(model.named_parameters()), 0.9)
    good = {name: mean.clone() for name, mean in ema.tensors().items()}
    with pytest.raises(UserError, match="only one of them has the parameter 'extra'"):
        ema.load_tensors({**good, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"'0.weight' is float32\[5\].*\[4, 3\]"):
        ema.load_tensors({**{name: mean + 1 for name, mean in good.items()}, "0.weight": torch.zeros(5)})
    assert all(torch.equal(mean, good[name]) for name, mean in ema.tensors().items())


def test_frozen_parameters_have_no_mean():
    model = net()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in Ema(dict(model.named_parameters()), 0.9).tensors()
