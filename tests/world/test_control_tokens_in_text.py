"""Names of control tokens in training text stay text and are counted; a missing separator is reported."""

import json
from pathlib import Path

import pytest
from small_tokenizers import KINDS, added, library, write

from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer


def source_of(folder: Path, *texts: str) -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_no_control_token_but_the_separator(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = library(kind)
    added(made, ("<|endoftext|>", True), ("<tool>", False), ("[END]", False), ("covid", False), ("    ", False))
    folder = write(tmp_path / "tokenizer", made, eos_token="<|endoftext|>", unk_token="<unk>")
    texts = ["the <tool> said <|endoftext|> and [END]", "covid    of <|endoftext|><|endoftext|>"] * 60
    dataset = prepare(source_of(tmp_path, *texts), tmp_path / "out", str(folder), val_fraction=0.5)
    tokenizer = load_tokenizer(folder)
    for split in ("train", "val"):
        ids = dataset.split(split).read(0, len(dataset.split(split))).tolist()
        assert ids.count(tokenizer.eot_id) == dataset.manifest.split(split).documents
        for name in ("<tool>", "[END]", "<s>", "</s>"):
            assert made.token_to_id(name) not in ids
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "control tokens" in line]
    assert "<|endoftext|> (180), <tool> (60), [END] (60)" in message
    assert "covid" not in message


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_our_own_tokenizers_count_too(tmp_path: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = prepare(
        source_of(tmp_path, "a<|endoftext|>" + "b" * 40, "c" * 30, "d" * 40), tmp_path / "out", spec, val_fraction=0.3
    )
    assert "text files at one): <|endoftext|> (1)" in capsys.readouterr().err
    assert dataset.tokenizer is not None


def test_text_without_names_is_not_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(source_of(tmp_path, "a" * 30, "c" * 30, "d" * 40), tmp_path / "out", "byte", val_fraction=0.3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["llama", "unigram", "wordlevel"])
def test_documents_without_a_separator_are_reported_with_a_remedy_that_works(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "tokenizer", library(kind, special=["<unk>", "<stop>"]))
    source = source_of(tmp_path, *(f"the sea {number}" for number in range(200)))
    first = prepare(source, tmp_path / "first", str(folder), val_fraction=0.5)
    assert "has no end-of-text token" in (told := capsys.readouterr().err)
    assert "eos_token in a tokenizer_config.json" in told
    write(tmp_path / "tokenizer", library(kind, special=["<unk>", "<stop>"]), eos_token="<stop>")
    second = prepare(source, tmp_path / "second", str(folder), val_fraction=0.5)
    assert "end-of-text" not in capsys.readouterr().err
    train = second.manifest.train
    assert train.tokens == first.manifest.train.tokens + train.documents


def test_prompts_may_ask_for_control_tokens() -> None:
    tokenizer = build_tokenizer("byte", ())
    assert tokenizer.encode_prompt("a<|endoftext|>") == list(b"a<|endoftext|>")
    assert tokenizer.encode_prompt("a<|endoftext|>", allow_special=True) == [97, 256]
