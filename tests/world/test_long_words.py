"""Long text without whitespace takes time in proportion to its length, and gives the ids of the `tokenizers` library."""

import random
import time

import pytest

from bardling.data.tokens import gpt2_bpe
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import build_tokenizer

MILLION = 1_000_000


def dna(size: int) -> str:
    return "".join(random.Random(1).choices("ACGT", k=size))


@pytest.mark.parametrize("text", [dna(MILLION), "a" * MILLION, " " * MILLION, "=" * MILLION, "日本" * 200_000, "\n" * MILLION])
def test_a_million_characters_without_a_break(tmp_path, text):
    begun = time.monotonic()
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(str(tmp_path / "a.txt"), tmp_path / "ds", "bpe:400")
    assert time.monotonic() - begun < 60
    ids = [i for split in ("train", "val") for i in dataset.split(split).read(0, len(dataset.split(split))).tolist()]
    assert dataset.tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 1.8


def test_ordinary_words_give_the_vocabulary_of_the_library():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(3)
    texts = [" ".join("".join(draw.choices("abcdeé日 ", k=draw.randrange(1, 60))) for _ in range(60)) for _ in range(40)]
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet, show_progress=False))
    ours = build_tokenizer("bpe:600", texts)
    assert [ours.encode(text).tolist() for text in texts] == [library.encode(text).ids for text in texts]


@pytest.mark.parametrize(("installed", "used"), [("0.9.0", False), ("0.12.0", False), ("0.13.0", True), ("1.0", True)])
def test_a_tiktoken_that_is_quadratic_is_not_used(monkeypatch, installed, used):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(gpt2_bpe, "version", lambda name: installed)
    vocabulary = {token: index for index, token in enumerate(gpt2_bpe.BYTE_OF)}
    content = {"model": {"vocab": vocabulary, "merges": []}}
    digest = gpt2_bpe.vocabulary_digest(content)
    assert (gpt2_bpe.fast_encoder(content, digest) is not None) == used
