"""The model against transformers' GPT-2, its cache against its full forward pass, and its refusals."""

import dataclasses

import pytest
import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.interop.huggingface import hf_config, hf_state
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT
from bardling.model.init import crop_block_size
from bardling.planning.presets import SIZES, size

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=75)


def tokens(batch: int = 3, time: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def perturbed(config: ModelConfig) -> GPT:
    """A model whose norms and biases are not at their initial values, so that leaving one out is noticed."""
    model = GPT(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wte" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_logits_loss_and_gradients_equal_those_of_transformers(bias: bool, gelu: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, bias=bias, gelu=gelu)
    model = perturbed(config)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    missing, unexpected = reference.load_state_dict(hf_state(model.state_dict(), config), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    reference.tie_weights()

    inputs = tokens()
    targets = tokens(seed=1)
    targets[0, :5] = -100
    assert relative(model(inputs), reference(inputs).logits) < 1e-5

    logits = reference(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(inputs, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    converted = hf_state(gradients, config)
    for name in gradients:
        assert relative(converted[name], theirs[name]) < 1e-5, name


def test_loss_of_each_token_is_zero_where_ignored_and_sums_to_the_sum() -> None:
    model = GPT(TINY)
    targets = tokens(seed=1)
    targets[1] = -100
    each = model(tokens(), targets, reduction="none")
    assert each.shape == targets.shape
    assert torch.all(each[1] == 0)
    torch.testing.assert_close(each.sum(), model(tokens(), targets))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(), targets, reduction="none"), each)


def test_too_long_an_input_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"25 tokens exceed model\.block_size = 24"):
        GPT(TINY)(tokens(time=25))


def test_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        GPT(ModelConfig())


@torch.no_grad()
@pytest.mark.parametrize("portions", [[24], [1] * 24, [7, 1, 1, 15], [10, 14]])
def test_cached_equals_full(portions: list[int]) -> None:
    model = perturbed(TINY)
    inputs = tokens()
    cache = KVCache(TINY, 3)
    parts = [model(part, cache=cache) for part in inputs.split(portions, dim=1)]
    assert cache.length == 24
    assert relative(torch.cat(parts, dim=1), model(inputs)) < 1e-5


@torch.no_grad()
def test_cached_rows_of_different_lengths_equal_full() -> None:
    model = perturbed(TINY)
    inputs = tokens()
    lengths = [9, 2, 13]
    cache = KVCache(TINY, 3)
    model(inputs[:, :13], cache=cache)
    cache.lengths = list(lengths)  # forget what came after each row's prompt
    for step in range(6):
        new = torch.stack([inputs[row, lengths[row] + step] for row in range(3)])[:, None]
        logits = model(new, cache=cache)[:, 0]
        for row in range(3):
            assert relative(logits[row], model(inputs[row : row + 1, : lengths[row] + step + 1])[0, -1]) < 1e-5
    logits = model(inputs[:, :3], cache=cache)  # several tokens at once
    for row in range(3):
        full = torch.cat([inputs[row, : lengths[row] + 6], inputs[row, :3]])[None]
        assert relative(logits[row], model(full)[0, -3:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 6, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_single_tokens_of_any_batch_equal_full(batch: int, bias: bool) -> None:
    config = dataclasses.replace(TINY, bias=bias)
    model = perturbed(config)
    inputs = tokens(batch=batch, time=5)
    cache = KVCache(config, batch)
    parts = [model(part, cache=cache) for part in inputs.split(1, dim=1)]
    assert relative(torch.cat(parts, dim=1), model(inputs)) < 1e-5


@torch.no_grad()
def test_dropping_a_row_keeps_the_others() -> None:
    model = perturbed(TINY)
    inputs = tokens()
    cache = KVCache(TINY, 3)
    model(inputs[:, :10], cache=cache)
    cache.drop(0)  # row 2 takes its place
    logits = model(inputs[[2, 1], 10:11], cache=cache)[:, 0]
    assert relative(logits, model(inputs[[2, 1], :11])[:, -1]) < 1e-5


@torch.no_grad()
def test_a_full_cache_is_refused() -> None:
    cache = KVCache(TINY, 3, capacity=8)
    with pytest.raises(ValueError, match="capacity of 8"):
        GPT(TINY)(tokens(), cache=cache)
    with pytest.raises(ValueError, match="2 rows"):
        GPT(TINY)(tokens(batch=2, time=4), cache=cache)


def test_dropout_acts_in_training_only() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=24, vocab_size=75, dropout=0.5))
    inputs = tokens()
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_padded_rows_stay_zero_in_training() -> None:
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(tokens(), tokens(seed=seed)).backward()
        gradient = model.transformer.wte.weight.grad
        assert gradient is not None
        assert torch.all(gradient[75:] == 0)
        assert torch.any(gradient[:75] != 0)
        optimizer.step()
    weight = model.transformer.wte.weight
    assert weight.shape[0] == 128
    assert torch.all(weight[75:] == 0)
    assert model(tokens()).shape[-1] == 75


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_cropped_positions_change_nothing_else(family: str) -> None:
    config = dataclasses.replace(TINY, family=family)
    model = perturbed(config)
    expected = model(tokens(time=8))
    state = crop_block_size(model.state_dict(), 8)
    model = GPT(dataclasses.replace(config, block_size=8))
    model.load_state_dict(state)
    assert torch.equal(model(tokens(time=8)), expected)
    with pytest.raises(ValueError, match="block_size = 8"):
        model(tokens(time=9))


def test_positions_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.block_size = 9: the weights have 8 positions"):
        crop_block_size(GPT(dataclasses.replace(TINY, block_size=8)).state_dict(), 9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_sizes_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    config = size(name)
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == parameters


def test_sizes_by_other_names_and_none() -> None:
    assert size("gpt2-124m") == SIZES["gpt2"]
    with pytest.raises(UserError, match="did you mean 'gpt2-xl'"):
        size("gpt2-xll")


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = GPT(TINY)
    inputs, targets = tokens(), tokens(seed=1)
    targets[0, :3] = -100
    plain = model(inputs, targets)
    plain.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(inputs, targets)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[name]) < 1e-4, name


def test_a_forward_pass_returns_what_is_asked_for() -> None:
    model, inputs = perturbed(TINY), tokens()
    targets, logits = inputs.roll(1, 1), model(inputs)
    hidden = model(inputs, targets, output="hidden")
    assert torch.equal(model(inputs, output="hidden"), hidden)
    assert torch.equal(model.head(hidden), logits)
    assert torch.equal(model(inputs, targets, output="logits"), logits)
    assert torch.equal(model(inputs, targets, output="loss"), model(inputs, targets))
    with pytest.raises(ValueError, match="needs targets"):
        model(inputs, output="loss")
    calls = []
    replaced = model(inputs, targets, transformer=lambda *arguments: calls.append(1) or model.transformer(*arguments))
    assert torch.equal(replaced, model(inputs, targets))
    assert calls == [1]


def test_only_the_selection_of_kernels_looks_at_devices() -> None:
    from pathlib import Path

    import bardling.model

    folder = Path(bardling.model.__file__).parent
    allowed = {"select.py", "flash_attention.py"}
    for file in folder.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert file.name in allowed or not any(word in source for word in ("device.type ==", "device.type !=", "is_cuda")), file
