"""A tokenizer that is only a vocab.json and a merges.txt gives the ids of transformers, or is refused by its class."""

import json
from pathlib import Path
from typing import Any

import pytest

from bardling.checkpoint.load import load_tokenizer_of
from bardling.data.tokens.bpe_files import pair_content
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError

TEXTS = (
    "The king met the queen 12345 times.",
    "  two  spaces, a\ttab\r\nand\n\n\nlines   ",
    "it's WE'LL they'd I'M",
    "naïve café, e\u0301 decomposed, ﬁ ligature, 東京 😀\u200d",
    "x = {1: [2, 3]};\u0085\u2028end",
    "",
)
SIZE = 280  # what the corpus below yields merges for
CORPUS = [*TEXTS, "the king and the queen and the rose " * 20, "it's 123 123 12 café " * 10]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=SIZE, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False)
    assert trained.get_vocab_size() == SIZE
    folder = tmp_path_factory.mktemp("pair")
    trained.save_model(str(folder))
    return {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}


def write(folder: Path, pair: dict[str, bytes], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in pair.items():
        (folder / name).write_bytes(data)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def library(folder: Path) -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(pair_content(folder)))


def same(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    assert library(folder).get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text


GPT2_CASES: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "model type": {"config": {"model_type": "gpt2"}},
    "class": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}},
    "fast class in config.json": {"config": {"model_type": "llama", "tokenizer_class": "GPT2TokenizerFast"}},
    "prefix space": {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    "named tokens outside the vocabulary": {
        "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    },
    "special tokens map": {
        "special_tokens_map": {
            "eos_token": {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
            "additional_special_tokens": ["<|user|>", "<|bot|>"],
        },
    },
    "added tokens": {"added_tokens": {"<|b|>": SIZE + 1, "<|a|>": SIZE}},
    "added tokens decoder": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                str(SIZE): {"content": "<|im_end|>", "special": True},
                str(SIZE + 1): {"content": "<tool>", "special": False, "lstrip": True},
            },
        },
    },
}


@pytest.mark.parametrize("name", GPT2_CASES)
def test_a_pair_gives_the_ids_of_gpt2s_class_in_transformers(tmp_path: Path, pair: dict[str, bytes], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "model", pair, **GPT2_CASES[name])
    same(load_tokenizer(folder), transformers.GPT2TokenizerFast.from_pretrained(folder), folder)
    assert load_tokenizer_of(folder).fingerprint == load_tokenizer(folder).fingerprint


@pytest.mark.parametrize(
    "files", [{"config": {"model_type": "qwen3"}}, {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}]
)
def test_a_pair_of_qwen_splits_and_normalizes_as_qwen_does(
    tmp_path: Path, pair: dict[str, bytes], files: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "model", pair, **files)
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder)
    same(ours, theirs, folder)
    assert ours.encode("e\u0301").tolist() == ours.encode("é").tolist()
    # GPT-2 keeps runs of digits together and does not compose characters.
    gpt2 = load_tokenizer(write(tmp_path / "gpt2", pair))
    assert gpt2.encode(TEXTS[0]).tolist() != ours.encode(TEXTS[0]).tolist()


def test_line_ends_of_windows_and_special_tokens_in_prompts(tmp_path: Path, pair: dict[str, bytes]) -> None:
    plain = load_tokenizer(write(tmp_path / "unix", pair))
    crlf = {"vocab.json": pair["vocab.json"], "merges.txt": pair["merges.txt"].replace(b"\n", b"\r\n")}
    assert load_tokenizer(write(tmp_path / "windows", crlf)).fingerprint == plain.fingerprint
    assert plain.eot_id == 0
    assert plain.encode("a<|endoftext|>b", allow_special=True).tolist()[1] == 0
    assert 0 not in plain.encode("a<|endoftext|>b").tolist()


def test_a_tokenizer_json_takes_precedence_over_the_pair(tmp_path: Path, pair: dict[str, bytes]) -> None:
    from bardling.data.tokens.tokenizer import build_tokenizer

    folder = write(tmp_path / "model", pair)
    build_tokenizer("byte", ()).save(folder)
    assert load_tokenizer(folder).kind == "byte"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"config": {"model_type": "llama"}}, r"how text is split for model_type = 'llama': convert it with transformers"),
    ({"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}, r"tokenizer_class = 'RobertaTokenizer' is not supported"),
    (
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}},
        r"AutoTokenizer\.from_pretrained\(.*save_pretrained",
    ),
    ({"tokenizer_config": {"tokenizer_class": 3}}, r"tokenizer_class = 3"),
    ({"added_tokens": {"<|far|>": 5000}}, r"'<\|far\|>' has id 5000, but 280 follows from vocab\.json"),
    ({"added_tokens": {"<|a|>": "x"}}, r"has the id 'x'"),
    ({"added_tokens": {"<|a|>": [1]}}, r"has the id '\[1\]'"),
    ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": []}}, "must be an object"),
    ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": 3}}, "is not a special token"),
    ({"vocab": {"a": "b"}}, r"vocab\.json: 'a' has the id 'b'"),
    ({"vocab": {"a": -1}}, r"vocab\.json: 'a' has the id -1"),
    ({"vocab": {"a": 0}}, "do not form a tokenizer"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
def test_other_pairs_are_refused_in_one_line(
    tmp_path: Path, pair: dict[str, bytes], files: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(write(tmp_path / "model", pair, **files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("merges", "message"),
    [(b"a b c\n", "line 1: 'a b c' is not two tokens"), (b"#version: 0.2\nabc\n", "line 2"), (b"\xff\xfe", "not UTF-8")],
)
def test_damaged_merges_are_refused_by_line(tmp_path: Path, pair: dict[str, bytes], merges: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"merges\.txt: .*{message}"):
        load_tokenizer(write(tmp_path / "model", {**pair, "merges.txt": merges}))


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_beginning_that_the_configuration_adds_is_in_the_post_processor(
    tmp_path: Path, pair: dict[str, bytes], bos: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    values = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True, "bos_token": bos}
    folder = write(tmp_path / "model", pair, tokenizer_config=values)
    expected = transformers.GPT2TokenizerFast.from_pretrained(folder)("The king")["input_ids"]
    assert library(folder).encode("The king").ids == expected
