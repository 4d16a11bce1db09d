"""The engine against single requests, full forward passes and transformers' own processors."""

import random
from collections.abc import Sequence

import pytest
import torch

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.errors import UserError
from bardling.generation import engine as engine_module
from bardling.generation.engine import Engine
from bardling.generation.requests import Output, Request
from bardling.generation.sampling import Sampling, adjust, pick
from bardling.model.gpt import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257, positions="rotary", tied=False)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Larger weights than at the start of training, so that contexts matter and likeliest tokens are clear."""
    model = GPT(CONFIG, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("byte", ["text"])


def finish(engine: Engine) -> dict[int, list[Output]]:
    found: dict[int, list[Output]] = {}
    while engine.running or engine.waiting:
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
    return found


def alone(model: GPT, request: Request, tokenizer: Tokenizer | None = None, **settings: int) -> list[Output]:
    engine = Engine(model, tokenizer, slots=1, **settings)  # type: ignore[arg-type]
    engine.submit(request)
    return finish(engine)[0]


def tokens_of(outputs: Sequence[Output]) -> list[int | None]:
    return [output.token for output in outputs]


def varied_requests(count: int) -> list[Request]:
    draw = random.Random(1)
    shared = tuple(draw.randrange(256) for _ in range(30))
    requests = []
    for index in range(count):
        own = tuple(draw.randrange(256) for _ in range(draw.choice([1, 2, 9, 25, 70])))
        sampling = Sampling(
            max_new_tokens=draw.randint(1, 40),
            temperature=draw.choice([0.0, 0.7, 1.3]),
            top_k=draw.choice([None, 5, 1000]),
            top_p=draw.choice([None, 0.9]),
            min_p=draw.choice([None, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            logit_bias=draw.choice([{}, {7: 3.0, 9: -100.0}]),
            seed=draw.randrange(3),
        )
        requests.append(Request(draw.choice([(), shared]) + own, sampling, index % 2))
    return requests


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"retained": 3}])
def test_a_completion_is_the_same_alone_and_among_others_that_come_and_go(model: GPT, settings: dict[str, int]) -> None:
    requests = varied_requests(16)
    expected = [tokens_of(alone(model, request)) for request in requests]
    engine = Engine(model, slots=5, **settings)  # type: ignore[arg-type]
    found: dict[int, list[Output]] = {}
    for request in requests:
        engine.submit(request)
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
        assert engine.running <= 5
    for number, outputs in finish(engine).items():
        found.setdefault(number, []).extend(outputs)
    assert [tokens_of(found[number]) for number in range(16)] == expected
    assert len({tuple(row) for row in expected}) == 16


def test_close_choices_are_decided_by_a_forward_pass_of_the_row_alone(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request((1, 2, 3), Sampling(12, temperature=0.9, seed=3))
    plain = tokens_of(alone(model, request))
    calls = []
    original = Engine._alone
    monkeypatch.setattr(Engine, "_alone", lambda self, row: calls.append(row.id) or original(self, row))
    assert tokens_of(alone(model, request)) == plain
    assert len(calls) <= 1  # close choices are rare
    monkeypatch.setattr(engine_module, "_TOLERANCE", 1e9)
    calls.clear()
    assert tokens_of(alone(model, request)) == plain
    assert len(calls) == 12
    monkeypatch.setattr(Engine, "_alone", lambda self, row: torch.nn.functional.one_hot(torch.tensor(5), 257).float() * 1e4)
    assert tokens_of(alone(model, request)) == [5] * 12


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_choices_that_small_errors_change_are_close(filters: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 20, generator=generator) * 2
    draws = torch.rand(4000, generator=generator).tolist()
    tolerance = 0.05
    errors = (torch.rand(4000, 20, generator=generator) - 0.5) * tolerance
    first = pick(logits, draws, tolerance=tolerance, **filters)  # type: ignore[arg-type]
    second = pick(logits + errors, draws, **filters)  # type: ignore[arg-type]
    changed = [place for place in range(4000) if first.tokens[place] != second.tokens[place]]
    assert len(changed) > 5
    missed = [place for place in changed if not first.close[place]]
    assert len(missed) <= len(changed) // 20
    assert sum(first.close) < 4000 // 3


def test_a_shared_prefix_is_computed_once(model: GPT) -> None:
    prompt = tuple(range(40))
    counted: list[int] = []
    hook = model.transformer.register_forward_pre_hook(lambda _, inputs: counted.append(inputs[0].numel()))
    try:
        engine = Engine(model, slots=8, retained=8)
        for index in range(8):
            engine.submit(Request(prompt, Sampling(3), index))
        outputs = finish(engine)
        assert sum(counted) == 39 + 3 * 8  # the prompt but its last token once, then three tokens of each row
        counted.clear()
        continued = (*prompt, *(token for token in tokens_of(outputs[7]) if token is not None), 200)
        engine.submit(Request(continued, Sampling(1)))
        finish(engine)
        assert sum(counted) == 2  # of a finished text, only the last token has no keys and values yet
    finally:
        hook.remove()


def test_long_prompts_do_not_stop_others(model: GPT) -> None:
    engine = Engine(model, prefill_tokens=10)
    first = engine.submit(Request((1, 2), Sampling(20)))
    engine.step()
    second = engine.submit(Request(tuple(range(60)), Sampling(2)))
    steps = [{output.request for output in engine.step()} for _ in range(7)]
    assert steps == [{first}] * 5 + [{first, second}] * 2


@torch.no_grad()
def test_log_probabilities_are_those_of_full_forward_passes(model: GPT, tokenizer: Tokenizer) -> None:
    prompt = tuple(b"some text of more than one chunk")
    sampling = Sampling(6, temperature=0.8, top_k=3, repetition_penalty=1.5, logprobs=4)
    for settings in ({}, {"prefill_tokens": 5}):
        outputs = alone(model, Request(prompt, sampling, prompt_logprobs=True), tokenizer, **settings)
        text = [*prompt, *(output.token for output in outputs if output.token is not None)]
        expected = model(torch.tensor([text]))[0].log_softmax(-1)  # [T, V]
        entries = [*outputs[0].prompt, *(output.logprob for output in outputs)]
        assert all(output.prompt == () for output in outputs[1:])
        assert [entry.token for entry in entries if entry] == text
        assert entries[0] is not None
        assert (entries[0].logprob, entries[0].top) == (None, ())
        for place, entry in enumerate(entries[1:]):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(expected[place, text[place + 1]]), abs=1e-4)
            best = expected[place].topk(4)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_generating(model: GPT) -> None:
    (output,) = alone(model, Request((5, 6, 7), Sampling(0), prompt_logprobs=True))
    assert (output.token, output.finish, len(output.prompt)) == (None, "length", 3)
    (output,) = alone(model, Request((5,), Sampling(0), prompt_logprobs=True))
    assert [entry.logprob for entry in output.prompt] == [None]


def test_text_ends_before_a_stop_string(model: GPT, tokenizer: Tokenizer) -> None:
    def run(stop: tuple[str, ...]) -> tuple[str, str | None]:
        sampling = Sampling(
            30, logit_bias={token: -100.0 for token in range(257) if token not in (97, 98, 99)}, seed=5, stop=stop
        )
        outputs = alone(model, Request((97,), sampling), tokenizer)
        assert all(output.finish is None for output in outputs[:-1])
        return "".join(output.text for output in outputs), outputs[-1].finish

    whole, finish = run(())
    assert (len(whole), finish) == (30, "length")
    stop = whole[10:13]
    place = whole.find(stop)
    assert run((stop, "never")) == (whole[:place], "stop")
    assert run((whole[-2:] + "z",)) == (whole, "length")  # what was held back is returned in the end
    assert run((whole[place + 1 : place + 9], stop)) == (whole[:place], "stop")


def test_stop_strings_are_held_back_while_they_may_come(tokenizer: Tokenizer, model: GPT) -> None:
    from bardling.generation.text import TextStream

    stream = TextStream(tokenizer, [97], ["xyz", "é!"])
    assert [stream.push(token) for token in b"axyxy"] == ["a", "", "", "xy", ""]
    assert stream.push(ord("a")) == "xya"
    assert [stream.push(token) for token in "é?".encode()] == ["", "", "é?"]
    assert [stream.push(token) for token in b"bxyzc"] == ["b", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_end_of_text_has_no_text(model: GPT, tokenizer: Tokenizer) -> None:
    eot = tokenizer.interface.eos[0]
    (output,) = alone(model, Request((97,), Sampling(9, logit_bias={eot: 1000.0})), tokenizer)
    assert (output.token, output.text, output.finish) == (eot, "", "stop")


def test_cancelled_requests_free_their_slots(model: GPT) -> None:
    engine = Engine(model, slots=2, prefill_tokens=8)
    long = engine.submit(Request(tuple(range(40)), Sampling(5)))
    running, waiting, last = (engine.submit(Request((number,), Sampling(30))) for number in (1, 2, 3))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 2)
    for request in (long, waiting, 12345):
        engine.cancel(request)
    assert (engine.running, engine.waiting) == (1, 1)
    for _ in range(3):
        engine.step()
    engine.cancel(running)
    outputs = finish(engine)
    assert set(outputs) == {last}
    found = tokens_of(outputs[last])
    assert found == tokens_of(alone(model, Request((3,), Sampling(30))))[-len(found) :]  # those of the steps above are gone
    assert engine.step() == []


def test_penalty_and_filters_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 50, generator=generator) * 3
    seen = [3, 7, 7, 20]
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    ours = adjust(logits[0], Sampling(repetition_penalty=1.7), seen)
    torch.testing.assert_close(ours, penalty(torch.tensor([seen]), logits.clone())[0])
    for min_p, top_k, top_p, temperature in ((0.1, None, None, 1.0), (0.05, 8, 0.8, 2.0), (0.3, None, 0.5, 0.7)):
        kept = transformers.TemperatureLogitsWarper(temperature)(None, logits.clone())
        if top_k:
            kept = transformers.TopKLogitsWarper(top_k)(None, kept)
        if top_p:
            kept = transformers.TopPLogitsWarper(top_p)(None, kept)
        kept = transformers.MinPLogitsWarper(min_p)(None, kept)
        draws = ((torch.arange(4000) + 0.5) / 4000).tolist()
        rows = pick(logits.expand(4000, -1), draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        frequencies = torch.bincount(torch.tensor(rows.tokens), minlength=50) / 4000
        torch.testing.assert_close(frequencies, kept[0].softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "prompt is empty"),
        (Request((257,)), "holds the id 257"),
        (Request((1,), Sampling(logit_bias={300: 1.0})), "logit_bias holds the id 300"),
        (Request((1,), Sampling(stop=("a",))), "needs a tokenizer"),
        (Request((1,), Sampling(0)), "max_new_tokens = 0"),
        (Request((1,) * 65, Sampling(0), prompt_logprobs=True), "65 tokens to score exceeds the context of 64"),
    ],
)
def test_bad_requests_are_refused_at_once(model: GPT, request_: Request, message: str) -> None:
    engine = Engine(model)
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert engine.step() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"logit_bias": {1: float("nan")}},
        {"stop": ("",)},
        {"logprobs": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
