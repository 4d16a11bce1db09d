"""Generation against a naive loop without a cache, and the choice of tokens against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.generation.generate import generate, prompt_ids, will_slide
from bardling.generation.sampling import pick
from bardling.model.gpt import GPT
from bardling.model.init import named_generator


def choose(logits: torch.Tensor, draws: list[float] | None, **filters: float | int | None) -> list[int]:
    return pick(logits, draws, **filters).tokens  # type: ignore[arg-type]


CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=75)


def enlarged(config: ModelConfig, seed: int) -> GPT:
    """Larger weights than at the start of training, so that contexts matter and likeliest tokens are clear."""
    model = GPT(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 12
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return enlarged(CONFIG, seed=4)


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
    # An untied head, since a tied one makes most tokens predict themselves.
    small = enlarged(ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=block_size, vocab_size=75, tied=False), seed=4)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11, 12]]
    if block_size == 1:  # then only the newest token is seen
        naive_rows = [naive_one(small, prompt, 9) for prompt in prompts]
    else:
        naive_rows = [naive(small, prompt, 9) for prompt in prompts]
    assert min(len(set(row)) for row in naive_rows) > 2
    assert run(small, prompts, 9, temperature=0.0) == naive_rows


@torch.no_grad()
def naive_one(model: GPT, prompt: list[int], count: int) -> list[int]:
    made = [prompt[-1]]
    for _ in range(count):
        made.append(int(model(torch.tensor([made[-1:]]))[0, -1].argmax()))
    return made[1:]


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"temperature": 3.0}, {"temperature": 0.7, "top_k": 4}, {"temperature": 2.0, "top_p": 0.8}]
)
def test_samples_equal_those_of_full_forward_passes(settings: dict[str, float]) -> None:
    exact = enlarged(CONFIG, seed=4).double()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    expected = []
    for row, prompt in enumerate(prompts):
        random, text = named_generator(9, f"sample:{row}"), list(prompt)
        for _ in range(12):
            draw = float(torch.rand((), generator=random, dtype=torch.float64))
            text += choose(exact(torch.tensor([text]))[:, -1], [draw], **settings)  # type: ignore[arg-type]
        expected.append(text[len(prompt) :])
    assert run(exact, prompts, 12, seed=9, **settings) == expected


def test_defaults_are_temperature_one_seed_zero_and_no_restriction(model: GPT) -> None:
    prompts = [[1, 2, 3], [4]]
    plain = run(model, prompts, 12)
    assert plain == run(model, prompts, 12, temperature=1.0, seed=0)
    assert plain == run(model, prompts, 12, top_k=CONFIG.vocab_size, vocab_size=CONFIG.vocab_size)
    assert plain == run(model, prompts, 12, top_p=1.0)
    assert plain != run(model, prompts, 12, temperature=2.0)
    assert plain != run(model, prompts, 12, seed=1)


def test_top_k_one_and_tiny_top_p_generate_the_greedy_text(model: GPT) -> None:
    greedy = run(model, [[1, 2, 3], [4]], 12, temperature=0.0)
    assert run(model, [[1, 2, 3], [4]], 12, top_k=1) == greedy
    assert run(model, [[1, 2, 3], [4]], 12, top_p=1e-6) == greedy


@torch.no_grad()
def test_only_ids_of_the_tokenizer_are_drawn(model: GPT) -> None:
    prompt = [1, 2, 3]
    (made,) = run(model, [prompt], 10, temperature=0.0, vocab_size=20)
    for place, token in enumerate(made):
        assert token == int(model(torch.tensor([prompt + made[:place]]))[0, -1, :20].argmax())
    assert max(run(model, [prompt], 60, temperature=100.0, vocab_size=20)[0]) == 19
    assert max(run(model, [prompt], 60, temperature=100.0)[0]) > 19


def test_dropout_is_off_while_a_model_in_training_generates() -> None:
    noisy = enlarged(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=75, dropout=0.5), seed=4)
    expected = run(noisy, [[1, 2, 3]], 12, temperature=0.0)
    assert run(noisy.train(), [[1, 2, 3]], 12, temperature=0.0) == expected


def test_a_vocabulary_of_one_token_is_enough() -> None:
    constant = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=1, vocab_multiple=1))
    assert run(constant, [[0], [0, 0, 0]], 9) == [[0] * 9] * 2


def test_memory_depends_on_the_length_of_the_text_and_not_on_the_context() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=2**45, vocab_size=20, positions="rotary")
    assert len(run(GPT(config), [[1, 2], [3]], 4)[0]) == 4  # a cache of block_size tokens could not be allocated


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
        ([[1], [0, 74, 75]], {}, "prompt 1 holds the id 75"),
        ([[0, 74, -1]], {}, "id -1"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": math.inf}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"top_p": math.nan}, "top_p"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_invalid_arguments_raise_immediately(
    model: GPT, prompts: list[list[int]], settings: dict[str, float], message: str
) -> None:
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


def test_an_empty_prompt_starts_a_document_or_a_line() -> None:
    byte = build_tokenizer("byte", [])
    assert prompt_ids(byte, "") == [256]  # the end-of-text token
    assert prompt_ids(byte, "hi") == [104, 105]
    characters = build_tokenizer("char", ["a\nb"])
    assert characters.eot_id is None
    assert prompt_ids(characters, "") == [0]  # the line break sorts first
    assert prompt_ids(characters, "ba") == [2, 1]


def test_special_tokens_in_a_prompt_are_read_only_when_allowed() -> None:
    byte = build_tokenizer("byte", [])
    assert prompt_ids(byte, "a<|endoftext|>", allow_special=True) == [97, 256]
    assert prompt_ids(byte, "a<|endoftext|>") == list(b"a<|endoftext|>")


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


def test_top_p_stops_at_the_token_that_reaches_it_exactly() -> None:
    assert int((frequencies([1.0, 1.0, 1.0, 1.0], top_p=0.5) > 0).sum()) == 2
    assert int((frequencies([1.0, 1.0, 1.0, 1.0], top_p=0.51) > 0).sum()) == 3


def random_rows(count: int, vocabulary: int) -> tuple[torch.Tensor, list[float]]:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(count, vocabulary, generator=generator)
    return logits, torch.rand(count, generator=generator, dtype=torch.float64).tolist()


@pytest.mark.parametrize("unrestricted", [{"top_k": 7}, {"top_k": 100}, {"top_p": 1.0}, {"top_k": 7, "top_p": 1.0}])
def test_settings_that_allow_every_token_change_no_choice(unrestricted: dict[str, float]) -> None:
    logits, draws = random_rows(300, 7)
    assert choose(logits, draws, **unrestricted) == choose(logits, draws)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}])
def test_each_row_is_chosen_as_if_it_were_alone(settings: dict[str, float]) -> None:
    logits, draws = random_rows(9, 7)
    alone = [choose(logits[row : row + 1], draws[row : row + 1], **settings)[0] for row in range(9)]  # type: ignore[arg-type]
    assert len(set(alone)) > 2
    assert choose(logits, draws, **settings) == alone  # type: ignore[arg-type]


def test_choices_divide_by_temperature_one_by_default() -> None:
    logits, draws = random_rows(300, 7)
    assert choose(logits, draws) == choose(logits, draws, temperature=1.0)
    assert choose(logits, draws) != choose(logits, draws, temperature=2.0)


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


@pytest.mark.parametrize("temperature", [1e-300, 2.5e-308])  # quotients overflow at the second
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_temperatures_too_small_to_divide_by_take_the_likeliest_token(temperature: float, settings: dict[str, float]) -> None:
    logits = torch.tensor([[5.0, 1.0, -2.0], [1.0, 5.0, 4.0], [2.0, 2.5, 3.0], [-9.0, -5.0, -7.0]])
    for draw in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        assert choose(logits, [draw] * 4, temperature=temperature, **settings) == [0, 1, 2, 1]  # type: ignore[arg-type]


def test_rows_draw_independently() -> None:
    draws = [float(torch.rand((), generator=named_generator(seed, f"sample:{row}"))) for seed in range(3) for row in range(3)]
    assert len(set(draws)) == 9


def test_draws_of_a_seed_and_row_are_the_same_in_every_release() -> None:
    draws = [
        float(torch.rand((), generator=named_generator(*key), dtype=torch.float64))
        for key in [(0, "sample:0"), (0, "sample:1"), (1, "sample:0")]
    ]
    assert draws == pytest.approx([0.965988145812613, 0.656048031110668, 0.15156047246493098], abs=1e-15)
