"""`bardling.generate` takes prompts in every usual form, and says in one line what it cannot take; output works without a
terminal's file (notebooks)."""

import io
import sys
from collections import deque

import numpy as np
import pytest
import torch

import bardling
from bardling.config import ModelConfig
from bardling.model.gpt import GPT
from bardling.monitor.console import Console

IDS = [3, 1, 2]


@pytest.fixture(scope="module")
def model():
    return GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11, vocab_multiple=1))


def completions(model, prompts):
    return list(bardling.generate(model, prompts, max_new_tokens=6, seed=1))


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        torch.tensor(IDS),
        torch.tensor([IDS]),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        np.array([IDS], dtype=np.uint16),
        [np.array(IDS)],
        [torch.tensor(IDS)],
        [torch.tensor(3), torch.tensor(1), torch.tensor(2)],
        [np.int64(3), np.int64(1), np.int64(2)],
        deque(IDS),
        (ids for ids in [IDS]),
        torch.nn.Parameter(torch.tensor(IDS), requires_grad=False),
    ],
)
def test_one_prompt_in_any_form(model, prompt):
    assert completions(model, prompt) == completions(model, [IDS])


@pytest.mark.parametrize("prompts", [[range(2), [5]], [torch.tensor([0, 1]), np.array([5])], ([0, 1], (5,))])
def test_prompts_of_different_lengths(model, prompts):
    assert completions(model, prompts) == completions(model, [[0, 1], [5]])


def test_the_callers_prompts_do_not_grow(model):
    mine = [[1, 2]]
    completions(model, mine)
    assert mine == [[1, 2]]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("once", "found 'once', a str"),
        (b"once", "found b'once', a bytes"),
        (["once", "twice"], "prompt 0 holds 'once', a str"),
        ([[1], "once"], "found 'once', a str"),
        (None, "found None, a NoneType"),
        (3, "found 3, a int"),
        (torch.tensor(3), "found 3, a int"),
        (torch.tensor([0.5]), "prompt 0 holds 0.5, a float"),
        ([[True]], "prompt 0 holds True, a bool"),
        ([[1], 2], "found 2, a int"),
        ([1, [2]], r"prompt 0 holds \[2\], a list"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"prompt 0 holds \[0\], a list"),
        ({"a": [1]}, "a dict"),
        ([], "no prompts"),
        (torch.tensor([], dtype=torch.long), "no prompts"),
        ([[]], "prompt 0 is empty"),
        ([[11]], "prompt 0 holds the id 11, outside the vocabulary of 11 tokens"),
        ([-1], "prompt 0 holds the id -1, outside"),
    ],
)
def test_anything_else_is_one_clear_error_at_the_call(model, prompts, says):
    with pytest.raises(bardling.UserError, match=says) as error:
        bardling.generate(model, prompts, max_new_tokens=1)
    assert len(str(error.value)) < 250


def test_a_name_in_place_of_a_model():
    with pytest.raises(bardling.UserError, match=r"model = 'runs/first': is a name, not a model; .*bardling.load_model"):
        bardling.generate("runs/first", [[1]], max_new_tokens=1)


class Cell:
    """The output of a notebook: no `fileno`, no `encoding`, no `isatty`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


class BrokenCell(Cell):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("cell", [Cell, io.StringIO, BrokenCell])
def test_training_and_the_console_work_in_a_notebook(tiny, change, tmp_path, monkeypatch, cell):
    monkeypatch.setattr(sys, "stdout", cell())
    monkeypatch.setattr(sys, "stderr", Cell())
    short = change(tiny, train={"steps": 6}, sample={"every": 3})
    assert bardling.train(short, tmp_path / "run").step == 6
    if cell is Cell:
        assert "step 6/6" in sys.stdout.text
        assert "sample at step 3" in sys.stdout.text


def test_the_console_needs_only_write_and_flush():
    cell = Cell()
    console = Console(steps=3, first_step=0, stream=cell)
    console.note("naïve 日本")
    console.close()
    assert cell.text == "naïve 日本\n"
