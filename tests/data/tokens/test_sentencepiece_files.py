"""SentencePiece models give the ids of the `sentencepiece` library, on ordinary and on hostile text."""

import contextlib
import io
import json
import random
from itertools import product

import numpy as np
import pytest

from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError

spm = pytest.importorskip("sentencepiece")

SYMBOLS = ["<sep>", "<mask>"]
HOSTILE = [
    *("", " ", "  ", "a", " a", "a ", "  a  b  ", "\n", "a\nb", "\t\ta", "\u2581", "a\u2581b", "a \u2581 ", "\u3000wide\u3000"),
    *("<s>", "</s> x", "<unk>", "x<unk>y", "<0x41>", "a<0x41>b", "<0x41><0x42>", "a <s> </s>", "<mask>x<mask>", "foo<mas"),
    *("<sep>", "<sep>a", "a<sep>b", "a <sep> b<sep>", "<sep><sep>", "<sep><s><sep>", "<sep><0x41><sep>", " <sep>"),
    *(
        "日本語",
        "😀 emoji 👩‍👩‍👧",
        "ﬁ ① ½ Ａ",
        "e\u0301 é",
        "\u200b\u200dzero",
        "\x00nul\x01",
        "a\u0300\u0301b",
        "\u0301",
        " \u0301a",
    ),
    *(
        "\u1112\u1161\u11ab 한",
        "\ufeffbom",
        "\u00a0nbsp\u00a0x",
        "a\r\nb",
        "ǆ",
        "…",
        "x" * 300,
        "12345 99",
        "㌀",
        "カ\u3099",
        "～~",
        "㋿",
    ),
]


@pytest.fixture(scope="module")
def lines(corpus):
    found = corpus.read_text().split("\n")[:400]
    return [*found, *["日本語 のテキスト です", "Ünïcode ﬁ ① ½ test", "Привет мир", "déjà vu 12345 67"] * 10]


def model_of(lines, **options):
    buffer = io.BytesIO()
    settings = {"vocab_size": 400, "minloglevel": 2, "hard_vocab_limit": False, **options}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buffer, **settings)
    return buffer.getvalue()


def texts(lines):
    draw = random.Random(0)
    alphabet = "abd eEt\n\t <>s\u2581é日😀ﬁ①"
    return [*HOSTILE, *lines[:50], *("".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(300))]


@pytest.mark.parametrize(("kind", "table"), [*product(("bpe", "unigram"), ("identity", "nmt_nfkc"))])
def test_ids_are_those_of_the_library(kind, table, lines, tmp_path):
    for fallback, prefix, collapse, symbols in product((False, True), (True, False), (True, False), ([], SYMBOLS)):
        settings = {"byte_fallback": fallback, "add_dummy_prefix": prefix, "remove_extra_whitespaces": collapse}
        data = model_of(lines, model_type=kind, normalization_rule_name=table, user_defined_symbols=symbols, **settings)
        path = tmp_path / "x.model"
        path.write_bytes(data)
        expected, found = spm.SentencePieceProcessor(model_proto=data), load_tokenizer(path)
        assert found.vocab_size == expected.get_piece_size()
        assert found.eot_id == expected.eos_id()
        for text, ids in zip(texts(lines), found.encode_batch(texts(lines)), strict=True):
            assert ids.tolist() == expected.encode(text), (text, settings)
        if fallback and table == "identity" and not collapse:
            assert [found.decode(found.encode(text)) for text in texts(lines)] == [
                text.replace("\u2581", " ") for text in texts(lines)
            ]


def test_saved_with_a_dataset_it_is_the_same_tokenizer(lines, tmp_path):
    (tmp_path / "x.model").write_bytes(model_of(lines, byte_fallback=True))
    first = load_tokenizer(tmp_path / "x.model")
    first.save(tmp_path)
    second = load_tokenizer(tmp_path)
    assert (second.fingerprint, second.eot_id, second.kind) == (first.fingerprint, first.eot_id, "other")
    assert np.array_equal(second.encode("The king <0x41> é"), first.encode("The king <0x41> é"))
    assert isinstance(Tokenizer(json.loads((tmp_path / "tokenizer.json").read_text()), "copy"), Tokenizer)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_are_refused_by_name(kind, lines, tmp_path):
    (tmp_path / "x.model").write_bytes(model_of(lines, model_type=kind))
    with pytest.raises(UserError, match=r"words or characters.*convert it with transformers"):
        load_tokenizer(tmp_path / "x.model")


def test_a_symbol_that_normalization_changes_is_refused(lines, tmp_path):
    (tmp_path / "x.model").write_bytes(model_of(lines, user_defined_symbols=["<ﬁ>"]))
    with pytest.raises(UserError, match="changes the user-defined symbol '<ﬁ>'"):
        load_tokenizer(tmp_path / "x.model")


def test_damaged_files_are_user_errors(lines, tmp_path):
    data, draw, path = model_of(lines, normalization_rule_name="identity"), random.Random(1), tmp_path / "x.model"
    cases = [b"", b"\0" * 40, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"not a model", b"\x80" * 30, data[:1000]]
    with_table = model_of(lines)
    for whole in [data] * 150 + [with_table] * 5:
        changed = bytearray(whole)
        for _ in range(3):
            changed[draw.randrange(len(whole))] = draw.randrange(256)
        cases.append(bytes(changed))
    for case in cases:
        path.write_bytes(case)
        with contextlib.suppress(UserError):
            load_tokenizer(path).encode("The king and the queen")
    for length in range(0, len(data) - 400, 97):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"x\.model: is not a readable SentencePiece model"):
            load_tokenizer(path)
