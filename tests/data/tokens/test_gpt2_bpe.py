"""The fast encoder gives the same ids as the `tokenizers` library and is used only for GPT-2's vocabulary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.tokens import gpt2_bpe
from bardling.data.tokens import tokenizer as tokenizer_module
from bardling.data.tokens.gpt2_bpe import fast_encoder, vocabulary_digest
from bardling.data.tokens.tokenizer import build_tokenizer

pytest.importorskip("tiktoken")

TEXT = (
    "It's the king's \u00e9t\u00e9, they'll say; 1234 roses!  And \t\n\n  they've been (here) x = y**2 \u65e5\u672c\u8a9e. " * 3
)
TOKENIZER = build_tokenizer("bpe:500", [TEXT])  # of GPT-2's kind, but small
ENCODE = fast_encoder(TOKENIZER._content, vocabulary_digest(TOKENIZER._content))
PARTS = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "'s", "'S", "'ll", "\u2019s", "the", " king", "1", "\u00b2",
     "\u0665", "\u00e9", "e\u0301", "\u65e5\u672c", "\U0001f642", "_", "(", "<|endoftext|>", "\0", "\u200d", "\x85", "x" * 50]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(PARTS).map("".join)))
def test_the_same_ids_for_any_text(text):
    text = text.encode("utf-8", "replace").decode()
    assert ENCODE is not None
    assert np.array_equal(ENCODE([text])[0], TOKENIZER.encode_batch([text])[0])


def test_the_same_ids_for_every_script_and_many_texts():
    texts = [f"a{chr(c)}b1{chr(c)} {chr(c)}  {chr(c)}.{chr(c)}2" for c in range(0x20, 0x30000, 7) if not 0xD800 <= c < 0xE000]
    assert ENCODE is not None
    for fast, plain in zip(ENCODE(texts), TOKENIZER.encode_batch(texts), strict=True):
        assert np.array_equal(fast, plain)


def test_long_texts_without_a_break():
    for text in ("x" * 200_000, " " * 200_000, "\n" * 200_000):
        assert ENCODE is not None
        assert np.array_equal(ENCODE([text])[0], TOKENIZER.encode_batch([text])[0])


def test_used_only_for_the_known_vocabulary(monkeypatch):
    assert fast_encoder(TOKENIZER._content) is None
    digest = vocabulary_digest(TOKENIZER._content)
    content = TOKENIZER._content
    assert fast_encoder({**content, "model": {**content["model"], "dropout": 0.1}}, digest) is None
    word = {"id": 500, "content": "king", "special": False}
    assert fast_encoder({**content, "added_tokens": [*content["added_tokens"], word]}, digest) is None
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert fast_encoder(content, digest) is None


def test_a_tokenizer_uses_it_for_long_text(monkeypatch):
    calls = []
    tokenizer = build_tokenizer("bpe:500", [TEXT])
    monkeypatch.setattr(tokenizer_module, "GPT2_VOCAB_SIZE", tokenizer.vocab_size)
    monkeypatch.setattr(tokenizer_module, "fast_encoder", lambda content: lambda texts: calls.append(1) or ENCODE(texts))
    short, long = TEXT, TEXT * 600
    assert np.array_equal(tokenizer.encode_batch([short])[0], TOKENIZER.encode_batch([short])[0])
    assert calls == []
    for text in (long, " " * 1_200_000 + "king"):  # at so many spaces before a word, tiktoken gives up
        assert np.array_equal(tokenizer.encode_batch([text])[0], TOKENIZER.encode_with_library([text])[0])
    assert calls == [1, 1]


def test_vocabulary_digest_depends_only_on_the_content():
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    other = {"model": {"merges": [["a", "b"]], "vocab": {"ab": 2, "b": 1, "a": 0}}, "x": 1}
    assert vocabulary_digest({"model": model}) == vocabulary_digest(other)
    assert vocabulary_digest({"model": {**model, "merges": []}}) != vocabulary_digest(other)
    assert vocabulary_digest({}) == ""
    assert len(gpt2_bpe.GPT2_DIGEST) == 64
