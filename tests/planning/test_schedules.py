"""The learning rate: numbers worked out by hand, and properties for every configuration."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardling.config import OptimConfig
from bardling.planning.schedules import learning_rate


@st.composite
def configs(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    lr = draw(st.floats(1e-6, 1.0))
    config = OptimConfig(
        lr=lr,
        min_lr=draw(st.none() | st.floats(0, 1).map(lambda part: part * lr)),
        warmup_steps=draw(st.integers(0, 60)),
        schedule=draw(st.sampled_from(["cosine", "linear", "constant", "wsd"])),
        decay_steps=draw(st.none() | st.integers(1, 120)),
        decay_fraction=draw(st.floats(1e-20, 1.0)),
    )
    return config, draw(st.integers(1, 120))


def make(schedule: str, **settings: object) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, "schedule": schedule} | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.2),
        ("cosine", 3, 0.8),
        ("cosine", 4, 1.0),
        ("cosine", 12, 0.55),  # half way
        ("cosine", 8, 0.1 + 0.45 * (1 + math.sqrt(0.5))),  # a quarter of the way
        ("cosine", 20, 0.1),
        ("cosine", 1000, 0.1),
        ("linear", 4, 1.0),
        ("linear", 8, 0.775),
        ("linear", 12, 0.55),
        ("linear", 20, 0.1),
        ("constant", 0, 0.2),
        ("constant", 4, 1.0),
        ("constant", 1000, 1.0),
        ("wsd", 2, 0.6),
        ("wsd", 16, 1.0),
        ("wsd", 18, 0.55),  # the last fifth of 20 steps begins at 16
        ("wsd", 20, 0.1),
    ],
)
def test_hand_worked(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, make(schedule), 20) == pytest.approx(expected, rel=1e-12)


def test_decay_steps_wins_over_steps() -> None:
    config = make("linear", decay_steps=12)
    assert learning_rate(8, config, 20) == pytest.approx(0.55)
    assert [learning_rate(step, config, 20) for step in (12, 13, 19, 20)] == [0.1] * 4


def test_final_rate_defaults_to_a_tenth() -> None:
    assert learning_rate(20, make("cosine", min_lr=None), 20) == pytest.approx(0.1)


def test_warmup_is_nanogpts() -> None:
    config = OptimConfig(lr=6e-4, warmup_steps=2000)
    assert learning_rate(0, config, 600000) == pytest.approx(6e-4 / 2001)
    assert learning_rate(1999, config, 600000) == pytest.approx(6e-4 * 2000 / 2001)


def test_warmup_as_long_as_the_run_divides_nothing_by_zero() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        rates = [learning_rate(step, make(schedule, warmup_steps=5, decay_steps=5), 5) for step in range(8)]
        assert all(math.isfinite(rate) for rate in rates)


@given(configs(), st.integers(0, 300))
def test_stays_between_its_bounds(case: tuple[OptimConfig, int], step: int) -> None:
    config, steps = case
    rate = learning_rate(step, config, steps)
    assert 0 <= rate <= config.lr * (1 + 1e-12)
    if step >= config.warmup_steps:
        assert rate >= config.final_lr * (1 - 1e-12)
    if config.schedule != "constant" and step >= (config.decay_steps or steps):
        assert rate == config.final_lr


@given(configs())
def test_rises_in_the_warmup_and_never_after_it(case: tuple[OptimConfig, int]) -> None:
    config, steps = case
    end = config.decay_steps or steps
    warm = [learning_rate(step, config, steps) for step in range(min(config.warmup_steps, end))]
    assert all(a < b for a, b in itertools.pairwise(warm))
    after = [learning_rate(step, config, steps) for step in range(config.warmup_steps, 130)]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(after))


@given(configs())
def test_has_no_jumps(case: tuple[OptimConfig, int]) -> None:
    """From one step to the next it changes by no more than the steepest line that its settings allow."""
    config, steps = case
    end = config.decay_steps or steps
    if config.schedule != "constant" and config.warmup_steps >= end:
        return  # RunConfig refuses these
    span = config.decay_fraction * end if config.schedule == "wsd" else end
    span = max(min(span, end - config.warmup_steps), 1.0)
    steepest = max(config.lr / (config.warmup_steps + 1), config.lr * math.pi / 2 / span) * (1 + 1e-9)
    rates = [learning_rate(step, config, steps) for step in range(end + 3)]
    assert all(abs(a - b) <= steepest for a, b in itertools.pairwise(rates))
