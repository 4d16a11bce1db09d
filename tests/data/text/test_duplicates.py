"""Copies and near-copies among documents, compared with the exact Jaccard similarity of their word runs."""

import random

import pytest

from bardling.data.text import duplicates as module
from bardling.data.text.duplicates import THRESHOLD, Duplicates
from bardling.data.text.words import code_points, find_words

VOCABULARY = [f"word{number}" for number in range(400)]


def add(found, text):
    found.add(text, find_words(code_points(text)).hashes)


def changed(text, times, draw):
    words = text.split()
    for place in draw.sample(range(len(words)), times):
        words[place] = f"new{place}"
    return " ".join(words)


def jaccard(one, other):
    sets = [{tuple(words[n : n + 5]) for n in range(len(words) - 4)} for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture
def documents():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY, k=300)) for _ in range(60)]
    return [*texts, texts[5], changed(texts[7], 3, draw), changed(texts[8], 40, draw), texts[9].upper() + "!", "", "...", "..."]


def test_groups(documents):
    found = Duplicates()
    for text in documents:
        add(found, text)
    groups = {group.members: group.twins for group in found.groups()}
    assert jaccard(documents[7], documents[61]) > 0.85 > THRESHOLD > jaccard(documents[8], documents[62])
    assert groups == {(5, 60): (5, 5), (7, 61): (7, 7), (9, 63): (9, 9), (65, 66): (65, 65)}
    assert found.compare(5, 60) == (1.0, True)
    assert found.compare(9, 63) == (1.0, False)
    similarity, equal = found.compare(7, 61)
    assert not equal
    assert similarity == pytest.approx(jaccard(documents[7], documents[61]), abs=0.12)
    assert found.compare(0, 1)[0] < 0.1


def test_equal_texts_in_a_group_of_similar_ones(documents):
    found = Duplicates()
    for text in (documents[7], documents[0], documents[61], documents[61]):
        add(found, text)
    assert [(group.members, group.twins) for group in found.groups()] == [((0, 2, 3), (0, 0, 2))]


def test_result_does_not_depend_on_batches(documents, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 500)
    test_groups(documents)


@pytest.mark.parametrize("batch", [100, 10**6])
def test_parts_of_a_document_are_one_document(documents, monkeypatch, batch):
    monkeypatch.setattr(module, "_BATCH", batch)
    whole, found = Duplicates(), Duplicates()
    for text in documents:
        add(whole, text)
        lines = text.replace(" ", " \n", 40).splitlines()[30:] or [""]
        parts = [text[: len(text) - sum(map(len, lines))], *lines]
        add(found, parts[0])
        for part in parts[1:]:
            found.extend(part, find_words(code_points(part)).hashes)
    assert found.groups() == whole.groups()
    assert [found.compare(7, n) for n in range(60)] == [whole.compare(7, n) for n in range(60)]


def test_only_equal_texts_are_compared_beyond_the_limit(documents, monkeypatch):
    monkeypatch.setattr(module, "MOST_DOCUMENTS", 50)
    found = Duplicates()
    for text in documents:
        add(found, text)
    assert [group.members for group in found.groups()] == [(5, 60), (65, 66)]
    assert found.compare(7, 61) == (0.0, False)
