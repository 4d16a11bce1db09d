"""The configuration: checks and derived values."""

import ast
import dataclasses
import inspect
from typing import get_args, get_type_hints

import pytest

from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from bardling.errors import UserError


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: ModelConfig(n_embd=100, n_head=6),
            "n_embd = 100 is not divisible by model.n_head = 6: try --model.n_embd 96 or 102",
        ),
        (lambda: ModelConfig(n_layer=0), "model.n_layer = 0"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout = 1.0"),
        (lambda: DataConfig(val_fraction=0), "data.val_fraction = 0"),
        (lambda: OptimConfig(lr=1e-3, min_lr=2e-3), "optim.min_lr = 0.002"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "optim.betas"),
        (lambda: TrainConfig(micro_batch=0), "train.micro_batch = 0"),
        (lambda: TrainConfig(grad_clip=-1), "train.grad_clip = -1"),
        (lambda: EvalConfig(windows=0), "eval.windows = 0"),
        (lambda: SampleConfig(top_p=1.5), "sample.top_p = 1.5"),
        (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last = 0"),
        (
            lambda: RunConfig(optim=OptimConfig(warmup_steps=100, decay_steps=100)),
            "warmup_steps = 100 leaves no step",
        ),
    ],
)
def test_invalid_values_are_refused_with_key_value_and_rule(make, says):
    with pytest.raises(UserError, match=None) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


SECTIONS = (ModelConfig, DataConfig, OptimConfig, TrainConfig, EvalConfig, SampleConfig, CheckpointConfig, GuardConfig)
NUMBERS = [
    (section, name)
    for section in SECTIONS
    for name, hint in get_type_hints(section).items()
    if float in (hint, *get_args(hint))
]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_every_number_must_be_finite(section, name, value):
    wrong = (0.9, value) if name == "betas" else value
    with pytest.raises(UserError, match=rf"\.{name} = "):
        section(**{name: wrong})


def test_the_vocabulary_is_padded_up_to_the_multiple():
    assert ModelConfig(vocab_size=50257).padded_vocab_size == 50304
    assert ModelConfig(vocab_size=64).padded_vocab_size == 64


def test_the_final_learning_rate_defaults_to_a_tenth():
    assert OptimConfig(lr=1e-3).final_lr == pytest.approx(1e-4)
    assert OptimConfig(lr=1e-3, min_lr=0.0).final_lr == 0.0


def test_every_field_has_a_docstring():
    for section in SECTIONS:
        (node,) = ast.parse(inspect.getsource(section)).body
        assert isinstance(node, ast.ClassDef)
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section.__name__}.{ast.unparse(field.target)} has no docstring"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]
