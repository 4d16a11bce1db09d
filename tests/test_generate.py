"""Generation against a naive loop without a cache, and the choice of tokens against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.generate import choose, generate, row_generator, will_slide
from bardling.model.gpt import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=75)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Larger weights than at the start of training, so that contexts matter and likeliest tokens are clear."""
    model = GPT(CONFIG, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 12
    return model.eval()


@torch.no_grad()
def naive(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache; a full context falls back to its last half."""
    size = model.config.block_size
    made, context = [], prompt[-size:]
    for _ in range(count):
        if len(context) > size:  # what was full before the newest token came
            context = [*context[:-1][-(size // 2) :], context[-1]]
        token = int(model(torch.tensor([context]))[0, -1].argmax())
        made.append(token)
        context = [*context, token]
    return made


def run(model: GPT, prompts: list[list[int]], count: int, **settings: object) -> list[list[int | None]]:
    steps = list(generate(model, prompts, max_new_tokens=count, **settings))  # type: ignore[arg-type]
    return [[step[row] for step in steps] for row in range(len(prompts))]


def test_greedy_equals_the_naive_loop_for_prompts_of_any_length(model: GPT) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(30))]
    expected = [naive(model, prompt, 40) for prompt in prompts]
    assert len({tuple(row[:8]) for row in expected}) == 4
    assert run(model, prompts, 40, temperature=0.0) == expected


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_greedy_equals_the_naive_loop_for_tiny_contexts(block_size: int) -> None:
    small = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, vocab_size=20), seed=1).eval()
    prompts = [[1, 2, 3], [4]]
    if block_size == 1:  # then only the newest token is seen
        naive_rows = [naive_one(small, prompt, 9) for prompt in prompts]
    else:
        naive_rows = [naive(small, prompt, 9) for prompt in prompts]
    assert run(small, prompts, 9, temperature=0.0) == naive_rows


@torch.no_grad()
def naive_one(model: GPT, prompt: list[int], count: int) -> list[int]:
    made = [prompt[-1]]
    for _ in range(count):
        made.append(int(model(torch.tensor([made[-1:]]))[0, -1].argmax()))
    return made[1:]


def test_a_sample_depends_on_seed_and_row_but_not_on_neighbours(model: GPT) -> None:
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = run(model, prompts, 24, seed=9)
    assert together == run(model, prompts, 24, seed=9)
    assert together != run(model, prompts, 24, seed=10)
    assert run(model, [*prompts, [7, 7, 7, 7]], 24, seed=9)[:3] == together
    assert run(model, prompts[:1], 24, seed=9) == together[:1]
    same = run(model, [[1, 2, 3]] * 2, 24, seed=9)
    assert same[0] != same[1]


def test_end_of_text_stops_a_row_and_leaves_the_others(model: GPT) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7], [8]]
    free = run(model, prompts, 12, temperature=0.0)
    eot = free[1][4]
    ends = [row.index(eot) if eot in row else len(row) for row in free]
    assert len(set(ends)) > 1
    stopped = run(model, prompts, 12, temperature=0.0, eot_id=eot)
    length = max(len(row) for row in stopped)
    for row, end, whole in zip(stopped, ends, free, strict=True):
        assert row == (whole[: end + 1] + [None] * length)[:length]


def test_should_stop_ends_early_and_mode_is_restored(model: GPT) -> None:
    asked = iter([False, False, True])
    model.train()
    steps = 0
    for _ in generate(model, [[1]], max_new_tokens=10, should_stop=lambda: next(asked)):
        steps += 1
        assert model.training
        assert torch.is_grad_enabled()
    assert steps == 2
    model.eval()


def test_autocast_is_entered_for_the_model_only(model: GPT) -> None:
    for _ in generate(model, [[1], [2, 3]], max_new_tokens=3, autocast=lambda: torch.autocast("cpu", torch.bfloat16)):
        assert not torch.is_autocast_enabled("cpu")


def test_half_precision_models_generate(model: GPT) -> None:
    half = GPT(CONFIG, seed=4).to(torch.bfloat16)
    assert len(list(generate(half, [[1, 2]], max_new_tokens=20, top_k=5))) == 20


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[75]], {}, "id 75, outside the vocabulary of 75"),
        ([[-1]], {}, "id -1"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_refusals_come_at_once(model: GPT, prompts: list[list[int]], settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **{"max_new_tokens": 3, **settings})  # type: ignore[arg-type]


def test_damaged_weights_are_reported() -> None:
    damaged = GPT(CONFIG)
    with torch.no_grad():
        damaged.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        list(generate(damaged, [[1]], max_new_tokens=1))


def test_will_slide() -> None:
    assert not will_slide(10, 7, 16)  # the 16 tokens that are read fit; the last made is not read
    assert will_slide(10, 8, 16)
    assert will_slide(17, 1, 16)


# ---- choosing a token ----


def frequencies(logits: list[float], **settings: float) -> torch.Tensor:
    count = 20_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    chosen = choose(torch.tensor([logits]).expand(count, -1), draws, **settings)  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


def test_frequencies_are_the_softmax_of_logits_over_temperature() -> None:
    logits = [1.0, -0.5, 2.0, 0.0, -9.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        assert torch.allclose(frequencies(logits, temperature=temperature), expected, atol=0.015)
        top = torch.tensor([1.0, -math.inf, 2.0, 0.0, -math.inf])
        expected = (top / temperature).softmax(0)
        assert torch.allclose(frequencies(logits, temperature=temperature, top_k=3), expected, atol=0.015)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert (frequencies(logits, top_p=0.45) > 0).tolist() == [False, True, False, False]
    assert (frequencies(logits, top_p=0.6) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.8) > 0).tolist() == [False, True, True, True]
    assert torch.allclose(frequencies(logits, top_p=0.6), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.015)
    assert torch.allclose(frequencies(logits, top_p=1.0), torch.tensor([0.1, 0.5, 0.15, 0.25]), atol=0.015)


LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    logits=LOGITS,
    draw=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(1e-6, 100),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_a_chosen_token_is_always_an_allowed_one(
    logits: list[float], draw: float, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    (token,) = choose(torch.tensor([logits]), [draw], temperature=temperature, top_k=top_k, top_p=top_p)
    likelier = [other for other in logits if other > logits[token]]
    if top_k is not None:
        assert len(likelier) < top_k
    if top_p is not None:
        highest = max(logits)
        weights = sorted((math.exp((other - highest) / temperature) for other in logits), reverse=True)[:top_k]
        mass = sum(math.exp((other - highest) / temperature) for other in likelier) / sum(weights)
        assert mass < top_p + 1e-9


@given(logits=LOGITS, draw=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_temperature_zero_top_k_one_and_tiny_top_p_take_the_likeliest(logits: list[float], draw: float) -> None:
    row = torch.tensor([logits])
    best = max(logits)
    assert logits[choose(row, None)[0]] == best
    assert logits[choose(row, [draw], temperature=0.0)[0]] == best
    assert logits[choose(row, [draw], top_k=1)[0]] == best
    assert logits[choose(row, [draw], top_p=1e-9)[0]] == best


def test_extreme_settings_stay_finite() -> None:
    row = torch.tensor([[0.0, 5.0, -math.inf]])
    almost_one = math.nextafter(1.0, 0.0)
    assert choose(row, [almost_one], temperature=1e-300) == [1]
    assert choose(row, [almost_one]) == [1]
    assert choose(row, [0.0]) == [0]
    assert choose(torch.tensor([[-math.inf, 0.0]]), [0.0]) == [1]
    with pytest.raises(UserError, match="NaN"):
        choose(torch.tensor([[0.0, math.nan]]), [0.5])


def test_rows_draw_independently() -> None:
    draws = [float(torch.rand((), generator=row_generator(seed, row))) for seed in range(3) for row in range(3)]
    assert len(set(draws)) == 9
