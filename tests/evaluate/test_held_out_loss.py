"""Loss on held-out text, against a plain computation."""

import math
from types import SimpleNamespace

import pytest
import torch

from bardling.config import ModelConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.device import Precision
from bardling.evaluate.loss import Interrupted, LossResult, evaluate_loss, weighted_mean
from bardling.model.gpt import GPT

FLOAT32 = Precision("float32", "test", "cpu")


class Windows:
    """Seven windows of which the last is padded."""

    n = 7

    def __init__(self):
        random = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(11, (7, 13), generator=random)
        self.targets = self.tokens[:, 1:].clone()
        self.targets[6, 5:] = -100

    def batch(self, first, size):
        return Batch(self.tokens[first : first + size, :-1], self.targets[first : first + size])


@pytest.fixture
def model():
    return GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=11, dropout=0.5), seed=1).train()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_it_is_the_mean_over_target_tokens_whatever_the_batch_size(model, batch_size):
    windows, table = Windows(), torch.arange(11)
    result = evaluate_loss(model, windows, batch_size=batch_size, precision=FLOAT32, bytes_per_token=table)
    assert model.training, "the model's mode is left as it was"
    logits = model.eval()(windows.tokens[:, :-1])
    each = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), windows.targets.flatten(), ignore_index=-100, reduction="none"
    )
    reference, text = each.sum().item(), each[windows.targets.flatten() > 0].sum().item()  # token 0 has no bytes
    counted = windows.targets[windows.targets != -100]
    assert result.tokens == len(counted)
    assert result.loss == pytest.approx(reference / len(counted), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(text / math.log(2) / counted.sum().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_every_process_makes_the_same_forward_passes(model, processes):
    """Also where some have no sequences: of five processes, four have the 7 sequences in batches of 2."""
    table, passes, totals = torch.arange(11), [], []
    for rank in range(processes):
        context = SimpleNamespace(data_rank=rank, data_size=processes, device=torch.device("cpu"), any=bool)
        context.sum = lambda found: totals.append(found.clone()) or torch.ones_like(found)
        made = []
        with model.register_forward_pre_hook(lambda _, inputs, made=made: made.append(inputs[0].shape)):
            evaluate_loss(model, Windows(), batch_size=2, precision=FLOAT32, context=context, bytes_per_token=table)
        passes.append(len(made))
        assert all(shape[1] == 12 for shape in made)
    assert passes == [math.ceil(7 / (2 * processes))] * processes
    loss, tokens, size_in_bytes, text_loss = sum(totals).tolist()
    alone = evaluate_loss(model, Windows(), batch_size=2, precision=FLOAT32, bytes_per_token=table)
    assert (tokens, size_in_bytes) == (alone.tokens, alone.bytes)
    assert loss / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert text_loss / math.log(2) / size_in_bytes == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_progress_is_reported_and_a_stop_request_is_obeyed(model):
    seen = []
    evaluate_loss(model, Windows(), batch_size=3, precision=FLOAT32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    with pytest.raises(Interrupted):
        evaluate_loss(model, Windows(), batch_size=3, precision=FLOAT32, stop_requested=lambda: True)
    assert model.training


def test_perplexity_of_a_huge_loss_is_infinite_and_no_error():
    assert LossResult(1e4, None, 1, None).perplexity == math.inf


def test_the_loss_of_a_mixture_is_that_of_its_tokens():
    web = LossResult(loss=2.0, bits_per_byte=1.5, tokens=100, bytes=400)
    code = LossResult(loss=4.0, bits_per_byte=3.0, tokens=1000, bytes=2000)
    found = weighted_mean([web, code], [0.75, 0.25], ["web", "code"])
    assert found.loss == pytest.approx(0.75 * 2.0 + 0.25 * 4.0)
    # Of four tokens, three come from the web, with 4 bytes each, and one is code, with 2 bytes.
    assert found.bits_per_byte == pytest.approx((3 * 4 * 1.5 + 2 * 3.0) / (3 * 4 + 2))
    assert found.sources == {"web": web, "code": code}
    assert (found.tokens, found.bytes) == (1100, 2400)
    assert weighted_mean([web], [1.0], [""]) is web
    hopeless = LossResult(loss=math.inf, bits_per_byte=None, tokens=10, bytes=None)
    assert weighted_mean([web, hopeless], [1.0, 0.0], ["web", "other"]).loss == 2.0
