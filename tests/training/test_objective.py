"""Objectives: what a step minimises. A masked loss and a distillation loss each fit into one class."""

import pytest
import torch
import torch.nn.functional as F

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches import IGNORE
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.training.build import Execution, build
from bardling.training.objective import NextToken, Objective, Sums
from bardling.training.step import StepSettings, train_step

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8, tied=False)
FLOAT32 = Precision("float32", "test", "cpu")


class AfterToken(Objective):
    """Next-token loss of the targets that come after the first occurrence of a token, as an answer after a question."""

    def __init__(self, token):
        self.token = token

    def masked(self, batch):
        seen = (batch.inputs == self.token).cumsum(1) > 0
        return batch._replace(targets=batch.targets.masked_fill(~seen, IGNORE))

    def denominator(self, batch):
        return (self.masked(batch).targets != IGNORE).sum()

    def __call__(self, forward, batch):
        masked = self.masked(batch)
        return Sums(forward(masked.inputs, masked.targets, reduction="sum"))


class Distillation(Objective):
    """Kullback-Leibler divergence from a teacher's distribution, computed from the student's hidden states."""

    def __init__(self, teacher, head):
        self.teacher, self.head = teacher, head

    def denominator(self, batch):
        return torch.tensor(batch.inputs.numel())

    def __call__(self, forward, batch):
        with torch.no_grad():
            wanted = self.teacher(batch.inputs).log_softmax(-1)
        found = self.head(forward(batch.inputs, output="hidden")).log_softmax(-1)
        agree = (found.argmax(-1) == wanted.argmax(-1)).sum()
        return Sums(F.kl_div(found, wanted, log_target=True, reduction="sum"), {"agreement": agree})


def assembly(seed=0, **execution):
    return build(MODEL, OptimConfig(), Execution(FLOAT32, **execution), SINGLE, seed=seed)


def batches(count=2, rows=3):
    random = torch.Generator().manual_seed(1)
    tokens = [torch.randint(11, (rows, 13), generator=random) for _ in range(count)]
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


def step(made, objective, data):
    settings = StepSettings(objective, FLOAT32, SINGLE, grad_clip=0.0)
    made.state.model.train()
    return train_step(made.state, data, settings, forward=made.forward, lr=1e-3)


def gradients(made):
    return [parameter.grad for parameter in made.state.model.parameters()]


def test_a_masked_loss_is_the_mean_over_its_own_targets():
    made, data, objective = assembly(), batches(), AfterToken(4)
    model = made.state.model
    losses, masks = [], []
    for batch in data:
        losses.append(F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none"))
        masks.append(((batch.inputs == 4).cumsum(1) > 0).flatten())
    losses, masks = torch.cat(losses), torch.cat(masks)
    assert 0 < masks.sum() < masks.numel()
    reference = losses[masks].mean()
    expected = torch.autograd.grad(reference, list(model.parameters()))
    result = step(made, objective, data)
    assert result.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert result.tokens.item() == masks.sum().item()
    for found, wanted in zip(gradients(made), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_masked_targets_have_no_gradient():
    made, data = assembly(), batches(count=1)
    changed = data[0]._replace(targets=data[0].targets.clone())
    hidden = (data[0].inputs == 4).cumsum(1) == 0
    changed.targets[hidden] = (changed.targets[hidden] + 1) % 11
    step(made, AfterToken(4), data)
    before = [gradient.clone() for gradient in gradients(made)]
    other = assembly()
    step(other, AfterToken(4), [changed])
    assert all(torch.equal(one, two) for one, two in zip(before, gradients(other), strict=True))


def test_distillation_from_hidden_states_has_the_gradient_of_the_divergence():
    teacher, made, data = assembly(seed=5).state.model.eval(), assembly(), batches()
    model = made.state.model
    pairs = [(model(batch.inputs).log_softmax(-1), teacher(batch.inputs).log_softmax(-1).detach()) for batch in data]
    total = sum((wanted.exp() * (wanted - found)).sum() for found, wanted in pairs)
    count = sum(batch.inputs.numel() for batch in data)
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    agreement = sum((found.argmax(-1) == wanted.argmax(-1)).sum().item() for found, wanted in pairs)
    result = step(made, Distillation(teacher, model.head), data)
    assert result.loss.item() == pytest.approx(total.item() / count, rel=1e-5)
    assert result.sums["agreement"].item() == agreement
    for found, wanted in zip(gradients(made), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_student_learns_its_teacher():
    teacher, made, data = assembly(seed=5).state.model.eval(), assembly(), batches()
    objective = Distillation(teacher, made.state.model.head)
    settings = StepSettings(objective, FLOAT32, SINGLE)
    made.state.model.train()
    losses = [train_step(made.state, data, settings, forward=made.forward, lr=1e-2).loss.item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_compiled_forward_offers_hidden_states_too():
    teacher, data = assembly(seed=5).state.model.eval(), batches()
    results = []
    for made in (assembly(), assembly(compiled=True)):
        results.append(step(made, Distillation(teacher, made.state.model.head), data))
    assert results[0].loss.item() == pytest.approx(results[1].loss.item(), rel=1e-5)


def test_next_token_loss_counts_targets_and_their_bytes():
    (batch,) = batches(count=1)
    batch.targets[0, :5] = IGNORE
    table = torch.arange(11)
    objective, made = NextToken(table), assembly()
    assert objective.denominator(batch).item() == 31
    sums = objective(made.forward, batch)
    kept = batch.targets[batch.targets != IGNORE]
    assert sums.others["bytes"].item() == kept.sum().item()
    logits = made.state.model(batch.inputs).double()
    reference = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert sums.loss.item() == pytest.approx(reference.item(), rel=1e-6)
