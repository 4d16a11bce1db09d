"""Tokenizers: round trips, other software opening them, and files that should not be trusted."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.config import DataConfig
from bardling.data.tokens import vocabulary
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, is_tokenizer_path, load_tokenizer
from bardling.errors import UserError
from bardling.extensions import TOKENIZERS

EOT = "<|endoftext|>"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "naïve",
    "日本語",
    "👍",
    "def",
    "return",
    "self",
    "\t\n\n",
    "",
    "(x)",
    "==",
    "don't",
    "1234",
]


def corpus(size: int = 3000) -> str:
    rng = random.Random(0)
    return "".join(rng.choice(WORDS) + rng.choice([" ", "  ", "\n", "\n    ", ", "]) for _ in range(size))


BYTE = build_tokenizer("byte", ())
BPE = build_tokenizer("bpe:350", [corpus()])
CHAR = build_tokenizer("char", [corpus(), "abc"])


def stream(tokenizer: Tokenizer, ids: Any) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.push(int(token)) for token in ids) + decoder.finish()


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(text=st.one_of(st.text(), st.text(alphabet=" \n\r\t\u2028'sdt1a-é👍\u0301\0"), st.just(f"a{EOT}b")))
@settings(deadline=None)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert stream(tokenizer, ids) == text
    assert tokenizer.eot_id not in ids
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@given(ids=st.lists(st.integers(0, 256), max_size=12))
@settings(deadline=None)
def test_streaming_is_decoding_for_any_bytes(ids: list[int]) -> None:
    assert stream(BYTE, ids) == BYTE.decode(ids)


def test_streaming_gives_only_whole_characters() -> None:
    decoder = StreamDecoder(BYTE)
    assert [decoder.push(byte) for byte in "a👍é".encode()] == ["a", "", "", "", "👍", "", "é"]
    assert decoder.push(0xF0) == ""
    assert decoder.finish() == "\ufffd"


def test_bytes_are_bytes() -> None:
    assert (BYTE.kind, BYTE.vocab_size, BYTE.eot_id) == ("byte", 257, 256)
    assert BYTE.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert BYTE.bytes_per_token().tolist() == [1] * 256 + [0]
    assert BYTE.encode("a\ud800").tolist() == list("a\ufffd".encode())


def test_characters_are_sorted_as_in_nanogpt() -> None:
    text = "hello, wörld\n"
    tokenizer = build_tokenizer("char", [text])
    order = sorted(set(text))
    assert (tokenizer.kind, tokenizer.eot_id, tokenizer.vocab_size) == ("char", None, len(order))
    assert tokenizer.encode(text).tolist() == [order.index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text == stream(tokenizer, tokenizer.encode(text))
    assert tokenizer.bytes_per_token()[order.index("ö")] == 2
    several = build_tokenizer("char", ["ab", "c"])
    assert (several.eot_id, several.vocab_size) == (3, 4)
    assert several.bytes_per_token().tolist() == [1, 1, 1, 0]


def test_an_unknown_character_is_shown_with_its_place() -> None:
    tokenizer = build_tokenizer("char", ["ab\n"])
    with pytest.raises(UserError, match=r"character '€' \(U\+20AC\) at line 2, column 3 .* 3 characters"):
        tokenizer.encode("ab\nab€")
    with pytest.raises(UserError, match=r"character '<'"):
        CHAR.encode(EOT)


@pytest.mark.parametrize("tokenizer", [BYTE, CHAR], ids=["byte", "char"])
def test_table_look_up_equals_the_library(tokenizer: Tokenizer) -> None:
    text = corpus(300)
    assert tokenizer.encode(text).tolist() == tokenizer._library.encode(text, add_special_tokens=False).ids


def test_bpe_learns_and_counts_everything() -> None:
    assert (BPE.kind, BPE.vocab_size, BPE.eot_id) == ("bpe", 350, 349)
    text = corpus()
    assert len(BPE.encode(text)) < len(text.encode()) / 2
    again = build_tokenizer("bpe:350", iter([corpus()]))
    assert again.fingerprint == BPE.fingerprint
    assert build_tokenizer("bpe:351", [text]).fingerprint != BPE.fingerprint
    assert build_tokenizer("bpe:9999", ["ab ab"]).vocab_size < 300  # only as many as the text gives


def test_special_tokens_in_text_are_text() -> None:
    for tokenizer in (BYTE, BPE):
        assert tokenizer.eot_id not in tokenizer.encode(f"x{EOT}y")
        assert tokenizer.decode(tokenizer.encode(f"x{EOT}y")) == f"x{EOT}y"
        ids = tokenizer.encode(f"x{EOT}y{EOT}", allow_special=True).tolist()
        assert ids.count(tokenizer.eot_id) == 2
        assert ids[-1] == tokenizer.eot_id
        assert tokenizer.decode(ids) == stream(tokenizer, ids) == f"x{EOT}y{EOT}"


@given(text=st.text(alphabet="\n\n\n\n \r\t\x0b\x1c\x85\xa0\u2028\u200b's1a.é👍/", max_size=40))
@settings(deadline=None, max_examples=300)
def test_no_cut_changes_a_token(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_PIECE", 1)
        assert "".join(vocabulary.pieces(text)) == text
        assert BPE.encode(text).tolist() == BPE._library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
    ],
    ids=["prefix", "whole", "normalizer"],
)
def test_texts_are_not_cut_where_that_would_change_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr(vocabulary, "_PIECE", 5)
    text = corpus(200)
    assert tokenizer.encode(text).tolist() == tokenizer._library.encode(text, add_special_tokens=False).ids


def test_long_texts_in_pieces_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus(2000)
    whole = BPE._library.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(vocabulary, "_PIECE", 50)
    assert len(list(vocabulary.pieces(text))) > 20
    assert "".join(vocabulary.pieces(text)) == text
    assert BPE.encode(text).tolist() == whole


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, CHAR, build_tokenizer("char", ["abc"])], ids=["byte", "bpe", "char", "char1"])
def test_saved_and_read_again_also_by_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.fingerprint, again.eot_id) == (tokenizer.kind, tokenizer.fingerprint, tokenizer.eot_id)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint
    text = "abc" if tokenizer.vocab_size < 10 else corpus(50)
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_id


def test_sentencepiece_like_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {
        "<unk>": 0,
        "</s>": 1,
        "▁": 2,
        "a": 3,
        "▁a": 4,
        "é": 5,
        **{f"<0x{byte:02X}>": 6 + byte for byte in range(256)},
    }
    library = Library(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.eot_id) == ("other", 1)
    counts = tokenizer.bytes_per_token()
    assert counts[:7].tolist() == [5, 0, 1, 1, 2, 2, 1]  # decoded text contains the name of the unknown token
    ids = tokenizer.encode("a éa 👍 a")
    assert tokenizer.decode(ids) == "a éa 👍 a"
    decoder = StreamDecoder(tokenizer)
    given = [decoder.push(int(token)) for token in ids]
    assert "".join(given) + decoder.finish() == "a éa 👍 a"
    assert not any("\ufffd" in part for part in given)


def test_padding_and_truncation_of_a_file_are_ignored(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == BPE.fingerprint
    assert again.encode(corpus(20)).tolist() == BPE.encode(corpus(20)).tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "not a readable tokenizer"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":4000000000},"merges":[]}}', "over the limit"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}', "empty vocabulary"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}', "not a readable tokenizer"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}', "not a readable tokenizer"),
        (
            b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]},"added_tokens":5}',
            "not a readable tokenizer",
        ),
        (
            b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]},"pre_tokenizer":7}',
            "not a readable tokenizer",
        ),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)  # sparse
    with pytest.raises(UserError, match="the limit is 268,435,456"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bite", "did you mean 'byte'"),
        ("bpe", "SIZE must be a number"),
        ("bpe:many", "SIZE must be a number"),
        ("bpe:256", "between 257"),
        ("bpe:99999999", "between 257"),
        ("no/such/tokenizer.json", "must be byte, char, gpt2, bpe:SIZE, or an existing"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tokenizer(spec, ["text"])


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    for spec in ("char", "bpe:300"):
        with pytest.raises(UserError, match="text is empty"):
            build_tokenizer(spec, [])
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_ids_outside_the_vocabulary() -> None:
    for bad in (-1, 257):
        with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary of 257"):
            BYTE.decode([bad])


def test_names_of_tokenizers_take_precedence_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TOKENIZERS._registered, "toy", lambda texts: build_tokenizer("char", texts))
    for name in ("toy", "gpt2", "char", "other"):
        Path(name).write_text("not a tokenizer")
    assert [name for name in ("toy", "gpt2", "char", "other") if is_tokenizer_path(name)] == ["other"]
    Path("text.txt").write_text("to be or not to be " * 100)
    assert open_data(DataConfig(source="text.txt", tokenizer="toy", cache=str(tmp_path / "cache"))).vocab_size < 20
