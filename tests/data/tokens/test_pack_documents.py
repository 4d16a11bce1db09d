"""Packed documents: every token of the text is a target once, rows hold whole documents, and the waste is what is reported."""

import itertools
import json
import random

import numpy as np
import pytest

from bardling.config import DataConfig
from bardling.data.batches import IGNORE
from bardling.data.batches.loader import EvalSequences
from bardling.data.tokens.corpus import open_corpus
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.documents import Documents
from bardling.data.tokens.pack_documents import describe_packing
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import open_dataset
from bardling.errors import UserError

BLOCK = 24


@pytest.fixture(scope="module")
def texts():
    chance = random.Random(3)
    return [f"{number}: " + "ab cd"[: chance.randint(1, 5)] * chance.randint(0, 16) for number in range(200)]


@pytest.fixture
def source(tmp_path, texts):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def opened(source):
    return open_data(DataConfig(str(source), "byte", packing="documents"), context=BLOCK)


def test_every_token_is_a_target_once_and_documents_are_kept_apart(source, texts):
    dataset = opened(source)
    assert dataset.manifest.row == BLOCK + 1
    assert not dataset.manifest.holds_conversations
    eot, found = dataset.tokenizer.eot_id, []
    count = 0
    for name in ("train", "val"):
        batch = EvalSequences(dataset.split(name), BLOCK, None).batch(0, 10_000)
        inputs, targets = batch.inputs.flatten(), batch.targets.flatten()
        for begin, end in itertools.pairwise(batch.documents.unique().tolist()):
            fed, wanted = inputs[begin:end].tolist(), targets[begin:end].tolist()
            learned = [token for token in wanted if token != IGNORE]
            count += len(learned)
            # Each target is predicted from the token before it, and the first of a document from the end-of-text token.
            assert wanted[: len(learned)] == learned
            assert fed[1 : len(learned)] == learned[:-1]
            if fed[0] == eot and learned[-1:] == [eot]:
                found.append(bytes(learned[:-1]).decode())
    assert len(found) > 60
    assert sorted(found) == sorted(text for text in texts if len(text) < BLOCK), "no document that fits is cut"
    plain = open_data(DataConfig(str(source), "byte"))
    assert count == len(plain.split("train")) + len(plain.split("val"))


def test_the_waste_is_reported_as_it_is(source):
    dataset = opened(source)
    batch = EvalSequences(dataset.split("train"), BLOCK, None).batch(0, 10_000)
    waste = (batch.targets == IGNORE).double().mean().item()
    assert f"{waste:.2%} of the positions are not learned" in describe_packing(dataset.manifest)
    assert waste < 0.15
    assert f"{dataset.manifest.train.documents} documents packed into {batch.inputs.size(0)} rows" in describe_packing(
        dataset.manifest
    )
    assert describe_packing(open_data(DataConfig(str(source), "byte")).manifest) == ""


def test_rows_are_named_by_their_documents(source):
    dataset = opened(source)
    index = Documents(dataset, "train")
    (first, *_) = index.at(0, BLOCK + 1)
    assert first.name.startswith("texts.jsonl:")
    assert first.begin == 0


def test_the_same_rows_from_text_and_from_a_prepared_folder(source, tmp_path):
    dataset = opened(source)
    assert opened(source).path == dataset.path
    folder = prepare(str(source), tmp_path / "prepared", "byte").path
    assert opened(folder).fingerprint == dataset.fingerprint
    assert open_dataset(dataset.path).verify() == []
    assert open_corpus(DataConfig(str(dataset.path)), 99).manifest.row == BLOCK + 1


def test_a_validation_text_is_packed_too(source):
    dataset = open_corpus(DataConfig(str(source), "byte", val_source=str(source), packing="documents"), BLOCK)
    assert len(dataset.split("train")) == len(dataset.split("val"))
    assert np.array_equal(dataset.split("train").read(0, 500), dataset.split("val").read(0, 500))


def test_text_that_cannot_be_packed_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a single document " * 50)
    with pytest.raises(UserError, match=r"one-byte-\w+ contains a single document: use --data.packing concat"):
        opened(tmp_path / "one.txt")
    with pytest.raises(UserError, match=r"data.packing = 'documents': the char tokenizer has no end-of-text token"):
        DataConfig(tokenizer="char", packing="documents")
