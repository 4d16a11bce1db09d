"""Models converted to other weights: close to the original in logits and loss, and accepted wherever a model generates."""

import dataclasses

import pytest
import torch

from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.generation.engine import Engine
from bardling.generation.generate import generate
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling
from bardling.generation.weights import choose_weights, convert_weights
from bardling.model.gpt import GPT
from bardling.model.kernels import int8
from bardling.model.kernels.select import has_int8_kernel, packs_rows
from bardling.training.run import train

GPT2 = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=75)
QWEN3 = dataclasses.replace(GPT2, family="qwen3", n_kv_head=1, tied=False, logit_softcap=15.0)
TOKENS = torch.randint(75, (3, 32), generator=torch.Generator().manual_seed(1))


def enlarged(config: ModelConfig) -> GPT:
    """Larger weights than at the start of training, so that likeliest tokens are clear."""
    model = GPT(config, seed=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 6
    return model


@pytest.fixture(scope="module", params=[GPT2, QWEN3], ids=["gpt2", "qwen3"])
def model(request: pytest.FixtureRequest) -> GPT:
    return enlarged(request.param)


@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 0.03), ("int8", 0.03)])
@pytest.mark.parametrize("kernel", ["fused", "dequantized"])
@torch.no_grad()
def test_logits_and_losses_are_close(model, weights, error, kernel, monkeypatch):
    if kernel == "dequantized" or has_int8_kernel():
        monkeypatch.setattr(int8, "int8_kernel", lambda _: kernel)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert_weights(model, weights)
    expected, found = model(TOKENS), converted(TOKENS)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < error
    assert not torch.equal(found, expected)
    losses = [m(TOKENS[:, :-1], TOKENS[:, 1:], reduction="none") for m in (model, converted)]
    assert float((losses[0] - losses[1]).abs().mean()) < 0.05 * float(losses[0].mean())
    logits = converted(TOKENS[:, :-1])
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(own, losses[1].flatten(), rtol=0.02, atol=0.02)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float32_is_the_model_itself(model):
    assert convert_weights(model, "float32") is model
    assert convert_weights(model, "float32", rows=100) is model


@pytest.mark.skipif(not packs_rows(8, torch.device("cpu")), reason="this CPU gains nothing by packed matrices")
@pytest.mark.parametrize("rows", [3, 8, 16])
def test_packed_matrices_generate_the_same_texts(model, rows):
    packed = convert_weights(model, "float32", rows)
    assert packed is not model
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    prompts = [[1, 2, row + 3] for row in range(rows)]
    texts = [list(generate(each, prompts, max_new_tokens=12, temperature=0)) for each in (packed, model)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_converted_model_generates(model, weights):
    converted = convert_weights(model, weights)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    steps = list(generate(converted, prompts, max_new_tokens=8, temperature=0))
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for step in steps:
            with torch.no_grad():
                logits = converted(torch.tensor([text]))[0, -1]
            assert float(logits.max() - logits[step[row]]) < 0.1 * float(logits.abs().max())  # likeliest, but for rounding
            text.append(step[row])


def test_batches_of_all_sizes(model):
    """Float32 texts do not depend on how many others run beside them, whichever kernels that selects."""
    alone = [step[0] for step in generate(model, [1, 2, 3], max_new_tokens=6, temperature=0)]
    for rows in (2, 4, 7, 33):
        engine = Engine(model, slots=rows)
        for index in range(rows):
            engine.submit(Request((1, 2, 3), Sampling(6, temperature=0), index))
        texts: dict[int, list[int]] = {}
        while engine.running or engine.waiting:
            for output in engine.step():
                texts.setdefault(output.request, []).append(output.token)
        assert list(texts.values()) == [alone] * rows


def test_auto_says_why():
    name, why = choose_weights("auto", torch.device("cpu"))
    assert name in ("int8", "float32")
    assert "int8" in why
    assert choose_weights("bfloat16", torch.device("cpu")) == ("bfloat16", "as configured")


def test_what_cannot_be_converted(model):
    with pytest.raises(UserError, match="weights = 'int4'"):
        convert_weights(model, "int4")
    for weights in ("bfloat16", "int8"):
        with pytest.raises(UserError, match="not float32"):
            convert_weights(convert_weights(model, weights), "int8")


def test_commands(tiny, tmp_path, change, capsys):
    run = str(train(change(tiny, train={"steps": 8}), tmp_path / "run", quiet=True).folder)
    perplexities = []
    for weights in ("float32", "int8"):
        main(["eval", run, "--weights", weights, "--precision", "float32"])
        rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
        perplexities.append(float(rows["perplexity"]))
        assert ("weights" in rows) == (weights == "int8")
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.02)
    main(["sample", run, "--weights", "auto", "--max_new_tokens", "5", "--seed", "1"])
    captured = capsys.readouterr()
    assert captured.out
    assert "--weights" in captured.err
