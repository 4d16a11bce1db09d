"""Which name a wrong one is taken for."""

import pytest

from bardling.errors import closest
from bardling.planning.devices import ACCELERATORS

GPUS = [device.key for device in ACCELERATORS]


@pytest.mark.parametrize(
    ("word", "names", "found"),
    [
        ("H1000", GPUS, "H100-SXM"),
        ("h1000", GPUS, "H100-SXM"),
        ("H200-SMX", GPUS, "H200-SXM"),
        ("A1000", GPUS, "A100"),
        ("L400", GPUS, "L40"),
        ("4090", GPUS, "RTX-4090"),
        ("trian", ["train", "plan"], "train"),
        ("gpt2-x", ["gpt2", "gpt2-medium", "gpt2-xl"], "gpt2-xl"),
        ("learning_rat", ["learning_rate", "learning"], "learning_rate"),
    ],
)
def test_the_name_that_was_meant(word, names, found):
    assert closest(word, names) == f" (did you mean {found!r}?)"


@pytest.mark.parametrize(("word", "names"), [("TPU", GPUS), ("train", []), ("", ["train"])])
def test_nothing_is_better_than_a_name_unlike_it(word, names):
    assert closest(word, names) == ""
