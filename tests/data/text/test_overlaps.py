"""Passages of texts are found in documents, and what many documents contain is told apart."""

import random

import numpy as np
import pytest

from bardling.data.text import overlaps as module
from bardling.data.text.overlaps import Overlaps
from bardling.data.text.words import code_points, find_words

DRAW = random.Random(3)


def words(text):
    return find_words(code_points(text))


def sentence(count):
    return " ".join(f"w{DRAW.randrange(10**6)}" for _ in range(count))


def look(texts, documents):
    found = Overlaps(words(text).hashes for text in texts)
    for number, document in enumerate(documents):
        found.look(f"doc{number}", document, words(document))
    return found


def test_a_passage_is_found_with_its_length_and_text():
    text = sentence(200)
    part = " ".join(text.split()[50:100])
    found = look([sentence(40), text, sentence(5)], [sentence(100), f"{sentence(30)} {part.upper()}, {sentence(30)}"])
    (passage,) = found.passages()
    assert passage[:3] == (1, "doc1", 50)
    assert passage.excerpt.startswith(part.upper()[:30])
    assert not passage.boilerplate
    shares = found.shares(boilerplate=True)
    assert shares[0] == 0
    assert shares[1] == pytest.approx((50 - 12) / (200 - 12))
    assert np.isnan(shares[2])
    assert found.skipped == 1


@pytest.mark.parametrize(("count", "found"), [(7, False), (8, True), (12, True), (13, True)])
def test_short_texts_are_looked_for_as_a_whole(count, found):
    text = sentence(count)
    assert bool(list(look([text], [f"{sentence(20)} {text} {sentence(20)}"]).passages())) is found


@pytest.mark.parametrize("cut", [3, 11, 12, 13, 30, 57, 60])
@pytest.mark.parametrize("count", [9, 40])
def test_a_passage_is_found_across_the_parts_of_a_document(cut, count):
    text, inside = sentence(count), 20
    document = f"{sentence(inside)} {text} {sentence(20)}".split()
    whole, found = look([text], [" ".join(document)]), Overlaps([words(text).hashes])
    first, last = (" ".join(part) for part in (document[:cut], document[cut:]))
    found.look("doc0", first, words(first))
    found.look("doc0", last, words(last), words(first).hashes)
    assert found.shares(boilerplate=True).tolist() == whole.shares(boilerplate=True).tolist() == [1.0]
    assert all(passage.excerpt in " ".join(document) for passage in found.passages())


def test_twelve_words_of_a_longer_text_are_no_overlap():
    text = sentence(30)
    assert not list(look([text], [" ".join(text.split()[:12])]).passages())


def test_boilerplate_is_told_apart():
    licence, own = sentence(60), sentence(60)
    found = look([f"{licence} {own}"], [f"{licence} {sentence(10)}" for _ in range(11)])
    assert all(passage.boilerplate for passage in found.passages())
    assert found.shares(boilerplate=False)[0] == 0
    assert found.shares(boilerplate=True)[0] > 0.4


def test_texts_that_are_the_same_all_count():
    text = sentence(30)
    assert look([text, text], [text]).shares(boilerplate=True).tolist() == [1.0, 1.0]


def test_long_passages_are_found_in_a_fraction_of_the_runs(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 300)
    texts = [sentence(300) for _ in range(4)]
    found = look(texts, [f"{sentence(50)} {texts[2]}"])
    assert found.fraction < 0.5
    assert {passage.owner for passage in found.passages()} == {2}
    assert found.shares(boilerplate=True).tolist() == [0, 0, 1, 0]
