"""Every token is traced to the document that it came from, with and without an index."""

import json
import os
import random

import numpy as np
import pytest

from bardling.data.tokens import journal, prepare
from bardling.data.tokens.documents import Document, Documents
from bardling.data.tokens.shards import open_dataset
from bardling.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """300 documents, each of which says its own number."""
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"document {n} " + "é\n" * draw.randrange(40)} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    return prepare.prepare(str(source), tmp_path_factory.mktemp("data") / "set", "byte", shard_tokens=4000, workers=1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_document_is_found_by_each_of_its_tokens(dataset, split):
    tokens = dataset.split(split).read(0, len(dataset.split(split)))
    documents = Documents(dataset, split)
    assert documents.named
    found = documents.at(0, len(tokens))
    assert len(found) == dataset.manifest.split(split).documents
    assert [document.number for document in found] == list(range(len(found)))
    assert found[0].begin == 0
    assert found[-1].end == len(tokens)
    for before, document in zip([None, *found], found, strict=False):
        assert before is None or before.end == document.begin
        text = dataset.tokenizer.decode(tokens[document.begin : document.end - 1].tolist())
        assert document.name == f"text.jsonl:{int(text.split()[1]) + 1}"
        assert tokens[document.end - 1] == dataset.tokenizer.eot_id
        for place in (document.begin, document.end - 1):
            assert documents.at(place, 1) == [document]
    middle = found[5]
    assert documents.at(middle.begin - 1, middle.end - middle.begin + 2) == found[4:7]


def test_without_an_index_the_end_of_text_tokens_tell_documents_apart(source, tmp_path):
    made = prepare.prepare(str(source), tmp_path / "set", "byte", workers=1)
    named = Documents(made, "train").at(300, 500)
    for path in made.path.glob("documents-*"):
        path.unlink()
    plain = Documents(open_dataset(made.path), "train")
    assert not plain.named
    assert plain.at(300, 500) == [Document(document.begin, document.end) for document in named]
    assert plain.at(0, len(made.split("train")))[-1].end == len(made.split("train"))
    assert any("documents-train.bin" in problem for problem in made.verify()), "but it is said that something is missing"


def test_a_dataset_made_before_there_was_an_index_opens(dataset, tmp_path):
    from bardling.data.tokens.manifest import _digest

    old = tmp_path / "old"
    old.mkdir()
    for path in dataset.path.iterdir():
        if not path.name.startswith("documents-"):
            (old / path.name).write_bytes(path.read_bytes())
    content = json.loads((old / "manifest.json").read_text())
    for key in ("train", "val"):
        del content[key]["index"]
    del content["digest"]
    (old / "manifest.json").write_text(json.dumps({**content, "digest": _digest(content)}))
    opened = open_dataset(old)
    assert opened.fingerprint == dataset.fingerprint
    assert opened.verify() == []
    assert Documents(opened, "train").at(0, 1)[0].begin == 0


def test_a_source_of_one_document_is_one_document(tmp_path):
    (tmp_path / "one.txt").write_text("a single text " * 50)
    made = prepare.prepare(str(tmp_path / "one.txt"), tmp_path / "set", "char")
    assert Documents(made, "train").at(17, 4) == [Document(0, len(made.split("train")), 0, "one.txt")]


def test_the_same_index_from_any_number_of_processes_and_after_an_interruption(source, dataset, tmp_path, monkeypatch):
    parallel = prepare.prepare(str(source), tmp_path / "two", "byte", shard_tokens=4000, workers=2)
    assert contents(parallel.path) == contents(dataset.path)

    monkeypatch.setattr(prepare, "_BATCH", 500)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    original, calls = prepare.ShardWriter.add, 0

    def torn(self, *args, **options):
        nonlocal calls
        calls += 1
        if calls == 21:
            raise KeyboardInterrupt
        original(self, *args, **options)

    monkeypatch.setattr(prepare.ShardWriter, "add", torn)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(str(source), tmp_path / "torn", "byte", shard_tokens=4000, workers=1)
    left = tmp_path / ".torn.partial" / "documents-train.bin"
    left.write_bytes(left.read_bytes() + b"more than the journal knows")
    again = prepare.prepare(str(source), tmp_path / "torn", "byte", shard_tokens=4000, workers=1)
    assert calls > 21
    assert contents(again.path) == contents(dataset.path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: os.truncate(d / "documents-train.bin", 100), "documents-train.bin: is truncated"),
        (lambda d: os.truncate(d / "documents-train.jsonl", 3), "documents-train.jsonl: is damaged"),
        (
            lambda d: (d / "documents-train.bin").write_bytes(os.urandom((d / "documents-train.bin").stat().st_size)),
            "documents-train",
        ),
    ],
)
def test_a_damaged_index_is_named_and_no_hindrance_to_reading(source, tmp_path, damage, says):
    made = prepare.prepare(str(source), tmp_path / "set", "byte", workers=1)
    damage(made.path)
    opened = open_dataset(made.path)
    with pytest.raises(UserError, match=says):
        Documents(opened, "train").at(5000, 2000)
    assert any("documents-train" in problem for problem in opened.verify())
    assert np.array_equal(opened.split("train").read(0, 50), made.split("train").read(0, 50))


def test_a_token_is_found_in_its_file(dataset):
    split = dataset.split("train")
    assert split.place(0) == ("train-00000.bin", 0)
    assert split.place(3999) == ("train-00000.bin", 3999)
    assert split.place(4000) == ("train-00001.bin", 0)
    with pytest.raises(ValueError, match="not within"):
        split.place(len(split))
