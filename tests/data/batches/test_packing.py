"""Document bounds of a batch, compared with a plain search; refusals if documents cannot be told apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bardling.config import DataConfig
from bardling.data.batches.loader import Batch, EvalSequences, TrainSequences, shorten_context
from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.packing import document_bounds, document_start
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError

START = 7


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_bounds_are_those_of_a_plain_search(batch: int, time: int, density: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = np.where(chance.random((batch, time)) < density, START, chance.integers(0, 7, (batch, time)))
    expected = []
    for row in range(batch):
        for place in range(time):
            if place == 0 or rows[row, place] == START:
                expected.append(row * time + place)
    bounds = document_bounds(torch.from_numpy(rows) == START)
    assert bounds.dtype == torch.int32
    found = bounds.tolist()
    assert found[: len(expected)] == expected
    assert set(found[len(expected) :]) == {batch * time}, "padding with empty documents"
    room = len(bounds) - 1
    usual = batch * -(-time // 64)
    assert room == usual or room // 2 < len(expected) <= room


def test_the_shape_stays_until_there_are_more_documents_than_it_holds() -> None:
    plain = torch.zeros((4, 256), dtype=torch.long)
    some, many = plain.clone(), plain.clone()
    some[:, 100:103] = START
    many[:, ::8] = START
    assert len(document_bounds(plain == START)) == len(document_bounds(some == START)) == 17
    assert len(document_bounds(many == START)) == 129


def test_shortened_sequences_begin_documents_too() -> None:
    inputs = torch.zeros((2, 32), dtype=torch.long)
    inputs[0, [3, 8]] = inputs[1, [0, 20, 31]] = START
    found = shorten_context(Batch(inputs, inputs, document_bounds(inputs == START)), 8)
    assert found.inputs.shape == (8, 8)
    assert found.documents.dtype == torch.int32
    assert torch.equal(found.documents.unique(), document_bounds(found.inputs == START).unique())


def corpus(tmp_path, documents: int):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "document number {n} of several"}}\n' for n in range(documents)))
    return path


def test_batches_include_the_document_bounds(tmp_path) -> None:
    dataset = open_data(DataConfig(source=str(corpus(tmp_path, 40)), tokenizer="byte", val_fraction=0.2))
    start = document_start(True, dataset, dataset.tokenizer)
    assert start == dataset.tokenizer.eot_id
    split = dataset.split("train")
    order = SequenceOrder(3, len(split), 64)
    batch = TrainSequences(split, order, start).batch(0, 3)
    assert torch.equal(batch.documents, document_bounds(batch.inputs == start))
    assert (batch.documents.unique().numel() - 1) > 3, "documents end within these sequences"
    assert TrainSequences(split, order).batch(0, 3).documents is None
    held = EvalSequences(dataset.split("val"), 64, None, start).batch(0, 2)
    assert torch.equal(held.documents, document_bounds(held.inputs == start))
    assert document_start(False, dataset, None) is None


def test_documents_that_cannot_be_told_apart_are_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^data\.document_mask = True: the char tokenizer has no end-of-text token.*$"):
        DataConfig(tokenizer="char", document_mask=True)
    one = tmp_path / "one.txt"
    one.write_text("a single text " * 300)
    dataset = open_data(DataConfig(source=str(one), tokenizer="byte"))
    with pytest.raises(UserError, match=r"^data\.document_mask = True: .* contains a single document: omit the setting$"):
        document_start(True, dataset, dataset.tokenizer)
    for tokenizer in (None, build_tokenizer("char", ["abc"])):
        with pytest.raises(UserError, match=r"^data\.document_mask = True: .* no end-of-text token.*byte, bpe:SIZE.*$"):
            document_start(True, dataset, tokenizer)
