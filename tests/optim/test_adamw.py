"""The optimizer against AdamW written out in float64, and its state's way to named tensors and back."""

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from bardling.config import OptimConfig
from bardling.errors import UserError
from bardling.optim.build import build_optimizer, set_learning_rate
from bardling.optim.serialization import load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")
CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.embedding(x)))  # type: ignore[no-any-return]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in named(model).items()}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, lr: float = 1e-2) -> None:
    for name, gradient in gradients(model, step).items():
        named(model)[name].grad = gradient
    set_learning_rate(optimizer, lr)
    optimizer.step()


def test_equals_adamw_written_out() -> None:
    model = Net()
    weights = {name: p.detach().double().clone() for name, p in named(model).items()}
    means = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    for step in range(1, 21):
        lr = 1e-2 * step / 20
        update(model, optimizer, step, lr)
        for name, gradient in gradients(model, step).items():
            g = gradient.double()
            means[name] = 0.9 * means[name] + 0.1 * g
            squares[name] = 0.95 * squares[name] + 0.05 * g * g
            decay = 0.1 if weights[name].dim() >= 2 else 0.0
            ratio = (means[name] / (1 - 0.9**step)) / ((squares[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            weights[name] = weights[name] * (1 - lr * decay) - lr * ratio
    for name, parameter in named(model).items():
        torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)


def test_decays_matrices_only_and_is_fused() -> None:
    model = Net()
    decayed, plain = build_optimizer(model.named_parameters(), CONFIG, CPU).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model.embedding.weight), id(model.linear.weight)}
    assert {id(p) for p in plain["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.linear.bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["fused"]
    assert not build_optimizer(model.named_parameters(), CONFIG, torch.device("meta")).param_groups[0]["fused"]


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    model = Net()
    model.embedding.weight.requires_grad_(False)
    groups = build_optimizer(model.named_parameters(), CONFIG, CPU).param_groups
    assert all(p is not model.embedding.weight for group in groups for p in group["params"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to optimize"):
        build_optimizer(model.named_parameters(), CONFIG, CPU)


def test_learning_rate_follows_each_groups_scale() -> None:
    optimizer = build_optimizer(Net().named_parameters(), CONFIG, CPU)
    optimizer.param_groups[1]["lr_scale"] = 0.5
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]


def through_files(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors, meta = optimizer_tensors(optimizer, named(model))
    return load(save(tensors)), json.loads(json.dumps(meta))


def test_state_goes_on_to_the_bit() -> None:
    straight = Net()
    optimizer = build_optimizer(straight.named_parameters(), CONFIG, CPU)
    for step in range(5):
        update(straight, optimizer, step)
    resumed = Net(seed=1)
    resumed.load_state_dict(straight.state_dict())
    # Parameters in another order, and so numbered otherwise.
    again = build_optimizer(reversed(list(resumed.named_parameters())), CONFIG, CPU)
    tensors, meta = through_files(optimizer, straight)
    assert sorted(tensors)[:3] == ["embedding.weight.exp_avg", "embedding.weight.exp_avg_sq", "embedding.weight.step"]
    load_optimizer_tensors(again, named(resumed), tensors, meta)
    assert again.state[resumed.linear.bias]["step"].item() == 5
    for step in range(5, 10):
        update(straight, optimizer, step)
        update(resumed, again, step)
    for name, parameter in named(straight).items():
        assert torch.equal(parameter, named(resumed)[name])
    first, second = optimizer_tensors(optimizer, named(straight))[0], optimizer_tensors(again, named(resumed))[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loaded_state_shares_no_memory_with_its_source() -> None:
    model = Net()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    update(model, optimizer, 0)
    tensors, meta = through_files(optimizer, model)
    load_optimizer_tensors(optimizer, named(model), tensors, meta)
    tensors["linear.bias.exp_avg"].fill_(7)
    assert not (optimizer.state[model.linear.bias]["exp_avg"] == 7).any()


def test_before_the_first_step_there_is_no_state() -> None:
    model = Net()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    tensors, meta = optimizer_tensors(optimizer, named(model))
    assert tensors == {}
    update(model, optimizer, 0)
    load_optimizer_tensors(optimizer, named(model), tensors, meta)
    assert len(optimizer.state) == 0


def test_hyperparameters_come_from_the_configuration() -> None:
    model = Net()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    update(model, optimizer, 0)
    changed = build_optimizer(model.named_parameters(), OptimConfig(weight_decay=0.3), CPU)
    load_optimizer_tensors(changed, named(model), *through_files(optimizer, model))
    assert changed.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("linear.bias.exp_avg"), "incomplete"),
        (lambda t, m: [t.pop(f"linear.bias.{key}") for key in ("exp_avg", "exp_avg_sq", "step")], "lacks 1 .*linear.bias"),
        (lambda t, m: t.update({"linear.bias.exp_avg": torch.zeros(8)}), r"linear.bias.exp_avg.*float32\[8\].*float32\[7\]"),
        (lambda t, m: t.update({"linear.bias.exp_avg": torch.zeros(7, dtype=torch.int64)}), "int64"),
        (lambda t, m: t.update({"linear.bias.step": torch.zeros(3)}), "one number"),
        (lambda t, m: t.update({"other.exp_avg": torch.zeros(3)}), "'other.exp_avg', which belongs to no parameter"),
        (lambda t, m: t.update({"linear.bias": torch.zeros(7)}), "belongs to no parameter"),
        (lambda t, m: m.update(optimizer="Muon"), "Muon"),
        (lambda t, m: m.update(scalars=3), "malformed"),
        (lambda t, m: m.update(scalars={"linear.bias.exp_avg": 3}), "linear.bias.*incomplete"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: object, message: str) -> None:
    model = Net()
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU)
    update(model, optimizer, 0)
    tensors, meta = through_files(optimizer, model)
    before = optimizer_tensors(optimizer, named(model))[0]
    change(tensors, meta)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_optimizer_tensors(optimizer, named(model), tensors, meta)
    after = optimizer_tensors(optimizer, named(model))[0]
    assert all(before[name] is after[name] or torch.equal(before[name], after[name]) for name in before)
