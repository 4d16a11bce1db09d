"""Words and their runs as hashes, against a plain search with a regular expression."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardling.data.text import words as module
from bardling.data.text.words import code_points, find_words, ngrams


def words_of(text):
    found = find_words(code_points(text))
    return [text[begin:end] for begin, end in zip(found.starts, found.ends, strict=True)], found.hashes.tolist()


@given(st.text(alphabet="abcXYZ é1_.-\n", max_size=300))
def test_words_are_those_of_a_regular_expression(text):
    names, hashes = words_of(text)
    assert names == re.findall(r"[^\W_]+", text)
    by_name = dict(zip(map(str.lower, names), hashes, strict=True))
    assert [by_name[name.lower()] for name in names] == hashes
    assert len(set(by_name.values())) == len(by_name)


def test_case_punctuation_and_place_do_not_count():
    assert words_of("One, TWO. three")[1] == words_of("\n\n one two -- Three!")[1]


@pytest.mark.parametrize("text", ["日本語", "カナ", "สวัส"])
def test_characters_of_scripts_without_spaces_are_words(text):
    names, _ = words_of(f"a{text}b")
    assert names == ["a", *[c for c in text if unicodedata.category(c)[0] in "LM"], "b"]


def test_long_texts_are_cut_between_words(monkeypatch):
    text = " ".join(f"word{number % 97}" for number in range(500))
    whole = words_of(text)
    monkeypatch.setattr(module, "_PIECE", 64)
    assert words_of(text) == whole


def test_runs():
    hashes = find_words(code_points("a b c a b c")).hashes
    runs = ngrams(hashes, 3)
    assert len(runs) == 4
    assert runs[0] == runs[3]
    assert len(set(runs.tolist())) == 3
    assert ngrams(hashes[:2], 3).tolist() == ngrams(hashes[:2], 2).tolist()
    assert not ngrams(np.zeros(0, np.uint64), 3).size
