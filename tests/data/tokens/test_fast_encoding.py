"""`gigatoken` is used only where it gives the ids of `tokenizers`; a difference costs time, never a wrong token."""

import hashlib
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bardling.data.text.sources import open_source
from bardling.data.tokens import fast_encoding
from bardling.data.tokens import prepare as prepare_module
from bardling.data.tokens.fast_encoding import BulkEncoder, EncodersDiffer, has_fast, hostile_text
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in islice(open_source("stdlib").documents(), 40)]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return build_tokenizer("bpe:1000", texts[:10])


@pytest.fixture
def rows(texts, tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text[start : start + 500]}) + "\n" for text in texts for start in range(0, 5000, 500))
    )
    return path


@pytest.fixture
def wrong(monkeypatch):
    """A `gigatoken` that encodes the word 'seventeen' as something else of the same length."""
    import gigatoken

    def encode(self: gigatoken.Tokenizer, text: bytes) -> np.ndarray:
        return self._backend.encode(text.replace(b"seventeen", b"seventeem"))

    monkeypatch.setattr(gigatoken.Tokenizer, "encode", encode)


def content(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_ids_are_those_of_the_library(tokenizer, texts):
    encoder = BulkEncoder(tokenizer)
    assert encoder._fast is not None
    draw = random.Random(0)
    points = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    draw.shuffle(points)
    hard = ["".join(points[:100_000]), " a".join(points[-20_000:]), "word" * 50_000, " " * 70_000, "<|endoftext|> <|endof", ""]
    for text, ids in zip([*texts, *hard], encoder.encode([text.encode() for text in [*texts, *hard]]), strict=True):
        assert np.array_equal(ids, tokenizer.encode_with_library([text])[0])


def test_names_of_control_tokens_are_text(tokenizer):
    (ids,) = BulkEncoder(tokenizer).encode([b"a<|endoftext|>b"])
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def other_tokenizer(texts: list[str], name: str) -> Tokenizer:
    """A byte-level BPE with the pre-tokenization of another family."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    number = r"\p{N}{1,3}" if name == "llama3" else r"\p{N}"
    words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    pattern = Regex(r"\w{1,3}|\W" if name == "unusual" else rf"{words}|\s*[\r\n]+|\s+(?!\S)|\s+")
    split, plain = pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = Library(models.BPE())
    library.pre_tokenizer = plain if name == "no words" else pre_tokenizers.Sequence([split, plain])
    if name == "qwen":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|eot|>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text[:1000] for text in texts], trainer)
    return Tokenizer(json.loads(library.to_str()), name)


@pytest.mark.parametrize("name", ["llama3", "qwen", "unusual"])
def test_other_families_have_the_same_ids(texts, name):
    tokenizer = other_tokenizer(texts, name)
    encoder = BulkEncoder(tokenizer)
    assert (encoder._fast is None) == (name == "unusual")  # which it does not load
    for ids, expected in zip(encoder.encode([text.encode() for text in texts]), tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, expected)


def test_a_family_that_it_takes_for_another_is_found_by_the_hostile_text(texts):
    with pytest.raises(EncodersDiffer):
        BulkEncoder(other_tokenizer(texts, "no words"))


def test_it_is_not_tried_for_other_tokenizers(tokenizer):
    assert has_fast(tokenizer)
    assert not has_fast(build_tokenizer("byte", ()))
    assert not has_fast(build_tokenizer("char", ["abc"]))
    word = {**tokenizer.content["added_tokens"][0], "content": "hello", "special": False, "id": 1000}
    for changed in (
        {"added_tokens": [*tokenizer.content["added_tokens"], word]},  # a word that is found in text
        {"model": {**tokenizer.content["model"], "dropout": 0.1}},  # random
    ):
        assert not has_fast(Tokenizer({**tokenizer.content, **changed}, "changed"))


def test_loading_it_anew_changes_nothing(tokenizer, texts, monkeypatch):
    loads = []
    load = fast_encoding._Gigatoken._load
    monkeypatch.setattr(fast_encoding._Gigatoken, "_load", lambda self: loads.append(1) or load(self))
    monkeypatch.setattr(fast_encoding, "MOST_GROWTH", -(1 << 40))
    monkeypatch.setattr(fast_encoding, "_LEAST_BETWEEN_LOADS", 10_000)
    encoder = BulkEncoder(tokenizer)
    ids = [encoder.encode([text.encode()])[0] for text in texts]
    assert len(loads) > 5
    assert all(map(np.array_equal, ids, tokenizer.encode_batch(texts)))


def test_a_difference_on_the_hostile_text_is_noticed_before_anything_is_encoded(tokenizer, monkeypatch, wrong):
    BulkEncoder(tokenizer)  # 'seventeen' is not part of it
    hostile = hostile_text(tokenizer)
    monkeypatch.setattr(fast_encoding, "hostile_text", lambda _: f"{hostile} seventeen")
    with pytest.raises(EncodersDiffer, match="it's"):
        BulkEncoder(tokenizer)


def test_lost_bytes_are_noticed(tokenizer, monkeypatch):
    import gigatoken

    encoder = BulkEncoder(tokenizer)
    monkeypatch.setattr(gigatoken.Tokenizer, "encode", lambda self, text: self._backend.encode(text)[:-1])
    with pytest.raises(EncodersDiffer, match="bytes are missing"):
        encoder.encode([b"text " * 100_000])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_in_the_corpus_starts_again_with_the_library(rows, tokenizer, tmp_path, monkeypatch, capfd, workers):
    monkeypatch.setattr(prepare_module, "_BATCH", 20_000)
    monkeypatch.setattr(prepare_module, "_BATCH_OF_WORKER", 20_000)
    tokenizer.save(tmp_path)
    spec = str(tmp_path / "tokenizer.json")
    prepare(str(rows), tmp_path / "right", spec, val_fraction=0.2, workers=1)
    assert "gigatoken" not in capfd.readouterr().err
    if workers == 1:
        calls = []
        encode = fast_encoding._Gigatoken.encode

        def differs(self, some):
            calls.append(1)
            if len(calls) == 5:
                raise EncodersDiffer("seventeen")
            return encode(self, some)

        monkeypatch.setattr(fast_encoding._Gigatoken, "encode", differs)
    else:  # in a process of its own
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "gigatoken.py").write_text(
            "class Tokenizer:\n from_json = classmethod(lambda cls, text: cls())\n encode = lambda *_: []\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(broken), prepend=os.pathsep)
    prepare(str(rows), tmp_path / "ds", spec, val_fraction=0.2, workers=workers)
    told = capfd.readouterr().err
    assert told.count("gigatoken gives other tokens than tokenizers at ") == 1, told
    assert told.count("\n") == 1
    assert content(tmp_path / "ds") == content(tmp_path / "right")


def test_without_it_the_result_is_the_same(rows, tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    spec = str(tmp_path / "tokenizer.json")
    prepare(str(rows), tmp_path / "with", spec, val_fraction=0.2)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert not has_fast(tokenizer)
    prepare(str(rows), tmp_path / "without", spec, val_fraction=0.2)
    assert content(tmp_path / "with") == content(tmp_path / "without")
