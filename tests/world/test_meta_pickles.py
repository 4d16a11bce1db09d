"""nanoGPT's meta.pkl as variants of nanoGPT write it: NumPy values, whole words, further names; nothing in it is executed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bardling.data.tokens.token_files import open_token_folder, read_meta
from bardling.errors import UserError

CHARS = ["\n", " ", "a", "b", "é"]


def meta(tokens: list[str], **changes: Any) -> dict[str, Any]:
    return {"vocab_size": len(tokens), "itos": dict(enumerate(tokens)), "stoi": {t: i for i, t in enumerate(tokens)}} | changes


def read(folder: Path, content: Any, protocol: int = 4) -> Any:
    path = folder / "meta.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return read_meta(path)


NUMPY: dict[str, dict[str, Any]] = {
    "size": {"vocab_size": np.int64(5)},
    "small size": {"vocab_size": np.uint16(5)},
    "stoi": {"stoi": {char: np.int64(i) for i, char in enumerate(CHARS)}},
    "narrow stoi": {"stoi": {char: np.uint8(i) for i, char in enumerate(CHARS)}},
    "strings": {"itos": {i: np.str_(char) for i, char in enumerate(CHARS)}},
    "string keys": {"stoi": {np.str_(char): i for i, char in enumerate(CHARS)}},
    "array": {"itos": np.array(CHARS)},
    "object array": {"itos": np.array(CHARS, dtype=object)},
    "numbers as keys": {"itos": {np.int32(i): char for i, char in enumerate(CHARS)}},
    "big-endian": {"vocab_size": np.array(5, ">i4")[()]},
    "other values": {"loss": np.float32(1.5), "dates": np.arange(4)},
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", NUMPY)
def test_numpy_values_are_read_as_plain_ones(tmp_path: Path, name: str, protocol: int) -> None:
    size, tokenizer = read(tmp_path, meta(CHARS, **NUMPY[name]), protocol)
    assert (size, tokenizer.kind, tokenizer.vocab_size) == (5, "char", 5)
    assert tokenizer.encode("ab é\n").tolist() == [2, 3, 1, 4, 0]
    assert tokenizer.decode([2, 3, 1, 4, 0]) == "ab é\n"


class Anything:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.fromstring, ("1 2", int, -1, " ")


@pytest.mark.parametrize(
    "value",
    [
        Anything(),
        np.zeros((2, 2)),
        np.random.default_rng(),
        np.dtype("i4"),
        np.array([Anything()], dtype=object),
        np.ndarray,
        2j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"meta\.pkl") as caught:
        read(tmp_path, meta(CHARS, more=value))
    assert "\n" not in str(caught.value)


WORDS = ["the", "cat", "sat", ",", ".", "on"]
LEVELS: dict[str, tuple[list[str], str, list[int], str]] = {
    "words": (WORDS, "the cat sat, on.", [0, 1, 2, 3, 5, 4], "the cat sat , on ."),
    "words in another order": (WORDS[::-1], "the cat.", [5, 4, 1], "the cat ."),
    "punctuation joined": ([*WORDS, "..."], "the cat...", [0, 1, 6], "the cat ..."),
    "words split at spaces": (["the", "cat,", "sat", "don't"], "the cat,  don't\nsat", [0, 1, 3, 2], "the cat, don't sat"),
    "words and spaces": ([*WORDS, " ", "\n"], "the cat\non.", [0, 6, 1, 7, 5, 4], "the cat\non."),
    "words and runs of spaces": ([*WORDS, " ", "  ", "\n\n"], "the  cat\n\non", [0, 7, 1, 8, 5], "the  cat\n\non"),
    "an unknown word": ([*WORDS, "<unk>"], "the dog sat", [0, 6, 2], "the <unk> sat"),
    "an end of text": ([*WORDS, "<|endoftext|>"], "cat <|endoftext|>", [1, 6], "cat <|endoftext|>"),
    "characters and names": ([*"ab \n", "<pad>", "<|endoftext|>"], "b a", [1, 2, 0], "b a"),
    "an early end of text": (["<|endoftext|>", *"ab "], "a b", [1, 3, 2], "a b"),
}


@pytest.mark.parametrize("name", LEVELS)
def test_words_are_found_as_their_vocabulary_says(tmp_path: Path, name: str) -> None:
    tokens, text, ids, decoded = LEVELS[name]
    size, tokenizer = read(tmp_path, meta(tokens))
    assert size == tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode(text, allow_special=True).tolist() == ids
    assert tokenizer.decode(ids) == decoded


def test_an_unknown_word_without_a_token_for_it_is_a_user_error(tmp_path: Path) -> None:
    _, tokenizer = read(tmp_path, meta(WORDS))
    with pytest.raises(UserError, match=r"meta\.pkl: cannot encode the text"):
        tokenizer.encode("the dog")


def test_words_that_cannot_be_found_in_text_leave_the_size(tmp_path: Path) -> None:
    assert read(tmp_path, meta(["new york", "a b c", "the"])) == (3, None)


def test_a_folder_of_words_opens(tmp_path: Path) -> None:
    for split in ("train", "val"):
        np.array([0, 1, 2, 4], "<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta(WORDS, vocab_size=np.int64(6))))
    dataset = open_token_folder(tmp_path)
    assert dataset.vocab_size == 6
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.decode([0, 1, 2, 4]) == "the cat sat ."
