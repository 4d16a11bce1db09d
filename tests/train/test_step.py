"""One optimizer step: exact for every split of its batch, also with masked targets."""

import copy

import pytest
import torch

from bardling.config import ModelConfig, OptimConfig
from bardling.data.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.train.signals import Stopped
from bardling.train.state import TrainState
from bardling.train.step import seed_dropout, train_step

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8)
FLOAT32 = Precision("float32", "test", "cpu")


def state(seed=0):
    model = GPT(CONFIG, seed=seed).train()
    return TrainState(model, build_optimizer(model.named_parameters(), OptimConfig(), torch.device("cpu")))


def batch(size=6, masked=True):
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (size, 13), generator=random)
    targets = tokens[:, 1:].clone()
    if masked:  # very unevenly, so that a mean of means would be far off
        targets[0, 1:] = -100
        targets[3, :9] = -100
    return Batch(tokens[:, :-1].contiguous(), targets)


def step(state, batches, **options):
    defaults = {"forward": state.model, "lr": 1e-3, "grad_clip": 0.0, "precision": FLOAT32, "context": SINGLE}
    return train_step(state, batches, **{**defaults, **options})


def test_loss_and_gradient_are_those_of_the_mean_over_all_target_tokens():
    ours, whole = state(), batch()
    logits = ours.model(whole.inputs)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.targets.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(reference, list(ours.model.parameters()))
    result = step(ours, [whole])
    assert result.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for parameter, gradient in zip(ours.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (1, 1, 1, 1, 1, 1), (1, 5)])
def test_any_split_into_forward_passes_gives_the_same_update(sizes):
    once, split, whole = state(), state(), batch()
    result = step(once, [whole])
    parts = [Batch(*pair) for pair in zip(whole.inputs.split(sizes), whole.targets.split(sizes), strict=True)]
    again = step(split, parts)
    assert again.loss.item() == pytest.approx(result.loss.item(), rel=1e-6)
    assert again.tokens.item() == result.tokens.item() == (whole.targets != -100).sum().item()
    for one, other in zip(once.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_norm_and_reports_it_as_it_was():
    ours = state()
    result = step(ours, [batch()], grad_clip=0.01)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in ours.model.parameters()])
    assert result.grad_norm.item() > 0.01
    assert after.item() == pytest.approx(0.01, rel=1e-3)


def test_bytes_count_only_targets_that_count():
    table = torch.arange(11)
    whole = batch()
    expected = sum(int(token) for token in whole.targets.flatten() if token != -100)
    assert step(state(), [whole], bytes_per_token=table).bytes.item() == expected


def test_a_stop_between_forward_passes_leaves_the_state_as_it_was():
    ours, answers = state(), iter([False, True])
    before = copy.deepcopy(ours.model.state_dict())
    with pytest.raises(Stopped):
        step(ours, [batch(), batch()], stop_requested=lambda: next(answers))
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_the_learning_rate_is_the_one_given():
    ours = state()
    step(ours, [batch()], lr=0.0)
    untouched = state()
    for one, other in zip(ours.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_float16_scaling_gives_the_same_gradient():
    # The scaler works on CPU tensors too: the scaled and unscaled gradient must agree exactly, powers of two being exact.
    plain, scaled, whole = state(), state(), batch()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step(plain, [whole])
    step(scaled, [whole])
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_dropout_is_keyed_by_seed_step_and_rank():
    draws = set()
    for seed, number, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_dropout(seed, number, rank)
        draws.add(torch.rand(1).item())
    seed_dropout(0, 0, 0)
    assert torch.rand(1).item() in draws
    assert len(draws) == 4
