"""Token folders of other trainers open as they lie; damaged and hostile ones are named."""

import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.tokens import token_files as tokenfiles
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.token_files import detect_token_folder, open_token_folder, read_meta
from bardling.errors import UserError

CHARS = ["\n", " ", "b", "a", "é", "汉"]  # not in the order of their code points


@pytest.fixture(autouse=True)
def no_cached_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfiles, "gpt2_tokenizer", lambda: None)


def nanogpt_folder(folder: Path, train: list[int], val: list[int], meta: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(val, "<u2").tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def char_meta() -> dict[str, object]:
    return {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {char: i for i, char in enumerate(CHARS)}}


def llmc_file(path: Path, ids: list[int], magic: int = 20240520, version: int = 1, tokens: int | None = None) -> None:
    header = struct.pack("<3i", magic, version, len(ids) if tokens is None else tokens).ljust(1024, b"\0")
    path.write_bytes(header + np.array(ids, "<u2" if version == 1 else "<u4").tobytes())


def shards(folder: Path, name: str, split: str, rows: dict[int, list[int]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, row in rows.items():
        np.save(folder / f"{name}_{split}.npy.{number:03d}.npy", np.array(row, np.uint16))


def tokens(dataset: TokenDataset, split: str) -> list[int]:
    part = dataset.split(split)
    row = part.read(0, len(part))
    assert row.dtype == np.int64
    return row.tolist()


def test_nanogpt_with_characters(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path / "plays_char", [3, 2, 1, 4, 5], [0, 3, 3], char_meta())
    assert detect_token_folder(folder) == "nanogpt"
    dataset = open_token_folder(folder)
    assert isinstance(dataset, TokenDataset)
    assert (tokens(dataset, "train"), tokens(dataset, "val")) == ([3, 2, 1, 4, 5], [0, 3, 3])
    assert dataset.vocab_size == 6
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.decode(tokens(dataset, "train")) == "ab é汉"
    assert dataset.tokenizer.encode("ab é汉").tolist() == [3, 2, 1, 4, 5]
    assert dataset.tokenizer.bytes_per_token().tolist() == [1, 1, 1, 1, 2, 3]
    assert dataset.manifest.train.tokens == 5
    assert dataset.verify() == []


def test_nanogpt_without_characters(tmp_path: Path) -> None:
    dataset = open_token_folder(nanogpt_folder(tmp_path, [50256, 1, 50303], [7, 8]))
    assert (dataset.vocab_size, dataset.tokenizer) == (50304, None)
    dataset = open_token_folder(nanogpt_folder(tmp_path, [1, 2], [0], {"vocab_size": 3}))
    assert (dataset.vocab_size, dataset.tokenizer) == (3, None)


def test_a_tokenizer_beside_the_tokens_is_taken(tmp_path: Path) -> None:
    _, tokenizer = read_meta(nanogpt_folder(tmp_path / "m", [0], [0], char_meta()) / "meta.pkl")
    assert tokenizer is not None
    folder = nanogpt_folder(tmp_path / "t", [1, 2], [0])
    tokenizer.save(folder)
    dataset = open_token_folder(folder)
    assert dataset.tokenizer is not None
    assert (dataset.vocab_size, dataset.tokenizer.fingerprint) == (6, tokenizer.fingerprint)


def test_nano_gpt_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shards(tmp_path, "fine_web", "train", {1000: [50256, 4], 2: [50256, 2], 999: [50256, 3], 0: [50256, 1]})
    shards(tmp_path, "fine_web", "validation", {0: [50256, 9, 9]})
    assert detect_token_folder(tmp_path) == "nano-gpt"
    dataset = open_token_folder(tmp_path)
    assert tokens(dataset, "train") == [50256, 1, 50256, 2, 50256, 3, 50256, 4]
    assert tokens(dataset, "val") == [50256, 9, 9]
    assert dataset.vocab_size == 50257


def test_one_of_several_datasets_is_named(tmp_path: Path) -> None:
    for name, token in (("one", 1), ("two", 2)):
        shards(tmp_path, name, "train", {0: [token]})
        shards(tmp_path, name, "validation", {0: [token]})
    with pytest.raises(UserError, match=r"2 datasets: choose one of .*one, .*two"):
        open_token_folder(tmp_path)
    assert tokens(open_token_folder(tmp_path / "two"), "train") == [2]
    assert detect_token_folder(tmp_path / "three") is None


@pytest.mark.parametrize(("magic", "version", "vocab"), [(20240520, 1, 50257), (20240801, 7, 128256)])
def test_llmc_files(tmp_path: Path, magic: int, version: int, vocab: int) -> None:
    large = vocab - 1
    for number, ids in ((10, [3, large]), (2, [1, 2])):
        llmc_file(tmp_path / f"fineweb_train_{number:06d}.bin", ids, magic, version)
    llmc_file(tmp_path / "fineweb_val_000000.bin", [5], magic, version)
    assert detect_token_folder(tmp_path) == "llm.c"
    dataset = open_token_folder(tmp_path)
    assert tokens(dataset, "train") == [1, 2, 3, large]
    assert dataset.split("train").read(1, 2).tolist() == [2, 3]
    assert (tokens(dataset, "val"), dataset.vocab_size) == ([5], vocab)


def test_llmc_files_without_numbers(tmp_path: Path) -> None:
    llmc_file(tmp_path / "tiny_shakespeare_train.bin", [1, 2, 3])
    llmc_file(tmp_path / "tiny_shakespeare_val.bin", [4])
    assert tokens(open_token_folder(tmp_path), "train") == [1, 2, 3]


def test_the_fingerprint_follows_the_tokens(tmp_path: Path) -> None:
    one = open_token_folder(nanogpt_folder(tmp_path / "a", [1, 2, 3], [4])).fingerprint
    assert open_token_folder(nanogpt_folder(tmp_path / "b", [1, 2, 3], [4])).fingerprint == one
    assert open_token_folder(nanogpt_folder(tmp_path / "c", [1, 2, 4], [4])).fingerprint != one


def test_no_ones_folder(tmp_path: Path) -> None:
    assert detect_token_folder(tmp_path) is None
    assert detect_token_folder(tmp_path / "none" / "none") is None
    (tmp_path / "model.bin").write_bytes(b"x")
    assert detect_token_folder(tmp_path) is None
    with pytest.raises(UserError, match="contains no token files"):
        open_token_folder(tmp_path)
    nanogpt_folder(tmp_path / "ours", [1], [1])
    (tmp_path / "ours" / "manifest.json").write_text("{}")
    assert detect_token_folder(tmp_path / "ours") is None


class Creates:
    """Pickles into a program that makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def npy(array: object) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


def test_pickles_in_place_of_tokens_are_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    bomb = pickle.dumps(Creates(victim))
    objects = npy(np.array([Creates(victim)], dtype=object))
    (tmp_path / "n").mkdir()
    shards(tmp_path / "n", "x", "validation", {0: [1]})
    llmc = tmp_path / "l"
    llmc.mkdir()
    llmc_file(llmc / "x_val.bin", [1])
    for path, data, words in (
        (tmp_path / "n" / "x_train.npy.000.npy", objects, "pickled objects"),
        (tmp_path / "n" / "x_train.npy.000.npy", bomb, "not a NumPy array"),
        (llmc / "x_train.bin", bomb, "header"),
        (llmc / "x_train.bin", bomb + bytes(1024), "not one of llm.c's"),
        (
            nanogpt_folder(tmp_path / "g", [1], [1], char_meta()) / "train.bin",
            bomb + b"." * (len(bomb) % 2),
            "outside the vocabulary",
        ),
        (nanogpt_folder(tmp_path / "h", [1], [1]) / "meta.pkl", bomb, "refused"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            open_token_folder(path.parent)
        assert path.name in str(caught.value)
    assert not victim.exists()


def test_cut_and_lying_files(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path / "a", [1, 2, 3], [1])
    (folder / "train.bin").write_bytes(b"\1\0\2")
    with pytest.raises(UserError, match=r"train\.bin: has an odd number of bytes \(3\)"):
        open_token_folder(folder)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.bin: contains no tokens"):
        open_token_folder(folder)
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match="no files for the val split"):
        open_token_folder(folder)
    folder = nanogpt_folder(tmp_path / "b", [1, 50304], [1])
    with pytest.raises(UserError, match=r"train\.bin: token 1 is 50304"):
        open_token_folder(folder)
    llmc = tmp_path / "l"
    llmc.mkdir()
    llmc_file(llmc / "x_val.bin", [1])
    for count in (3, 1, 0, -1, 2**31 - 1):
        llmc_file(llmc / "x_train.bin", [1, 2], tokens=count)
        with pytest.raises(UserError, match=r"x_train\.bin"):
            open_token_folder(llmc)
    llmc_file(llmc / "x_train.bin", [1, 2], 20240801, 7)
    with pytest.raises(UserError, match="different widths"):
        open_token_folder(llmc)
    shards(tmp_path / "n", "x", "train", {0: [1, 2, 3]})
    shards(tmp_path / "n", "x", "validation", {0: [1]})
    shard = tmp_path / "n" / "x_train.npy.000.npy"
    whole = shard.read_bytes()
    for data in (whole[:-1], whole + b"\0", npy(np.zeros((2, 2), np.uint16)), npy(np.zeros(2)), npy(np.zeros(2, ">u2")), b""):
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"x_train\.npy\.000\.npy"):
            open_token_folder(tmp_path / "n")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"vocab_size": 7},
        {"vocab_size": "6"},
        {"vocab_size": 70_000},
        {"stoi": {"ab": 0}},
        {"stoi": dict.fromkeys(CHARS, 0)},
        {"stoi": [1]},
        {"itos": dict.fromkeys(range(6), "x")},
        {"itos": 5},
        {"vocab_size": 1, "stoi": {"a": 0, "b": [0]}},
        {"vocab_size": 1, "stoi": {"\ud800": 0}, "itos": None},
    ],
)
def test_vocabularies_that_do_not_agree(tmp_path: Path, change: dict[str, object]) -> None:
    folder = nanogpt_folder(tmp_path, [0], [0], {**char_meta(), **change})
    with pytest.raises(UserError, match=r"meta\.pkl"):
        open_token_folder(folder)


@settings(max_examples=150, deadline=None)
@given(head=st.binary(max_size=200), keep=st.integers(0, 12))
def test_any_bytes_as_a_shard_are_tokens_or_an_error(tmp_path_factory: pytest.TempPathFactory, head: bytes, keep: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    shards(folder, "x", "validation", {0: [1]})
    (folder / "x_train.npy.000.npy").write_bytes(npy(np.zeros(4, np.uint16))[:keep] + head)
    try:
        open_token_folder(folder)
        message = "x_train"
    except UserError as error:
        message = str(error)
    assert "x_train" in message
    assert len(message.splitlines()) == 1
