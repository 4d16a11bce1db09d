"""Dataset folders: what is written is read, and what was cut, changed or damaged is named."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.manifest import Manifest, read_manifest, write_manifest
from bardling.data.shards import ShardWriter, open_dataset, token_dtype
from bardling.data.tokenizer import build_tokenizer
from bardling.errors import UserError


def make(folder: Path, train: Any, val: Any, vocab_size: int = 257, shard_tokens: int = 7) -> Path:
    """A dataset of given ids in small files."""
    folder.mkdir()
    tokenizer = build_tokenizer("byte", ()) if vocab_size == 257 else None
    infos = []
    for name, ids in (("train", train), ("val", val)):
        with ShardWriter(folder, name, vocab_size, shard_tokens) as writer:
            for part in np.array_split(np.asarray(ids), 3):
                writer.add(part, text_bytes=part.size)
            infos.append(writer.finish())
    if tokenizer is not None:
        tokenizer.save(folder)
    manifest = Manifest(
        token_dtype(vocab_size),
        vocab_size,
        tokenizer.fingerprint if tokenizer else "",
        {"spec": "test"},
        0.1,
        infos[0],
        infos[1],
    )
    write_manifest(folder, manifest)
    return folder


@given(
    start=st.integers(0, 60),
    count=st.integers(0, 60),
    ids=st.lists(st.integers(0, 256), min_size=1, max_size=60),
    shard=st.integers(1, 25),
)
@settings(deadline=None, max_examples=60)
def test_reads_across_files(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int, ids: list[int], shard: int
) -> None:
    folder = make(tmp_path_factory.mktemp("d") / "ds", ids, [1], shard_tokens=shard)
    split = open_dataset(folder).split("train")
    assert len(split) == len(ids)
    if start + count > len(ids):
        with pytest.raises(ValueError, match="not within"):
            split.read(start, count)
    else:
        out = split.read(start, count)
        assert out.dtype == np.int64
        assert out.tolist() == ids[start : start + count]


@pytest.mark.parametrize(("vocab_size", "width"), [(257, 2), (65536, 2), (65537, 4), (1 << 24, 4)])
def test_width_follows_the_vocabulary_and_nothing_wraps(tmp_path: Path, vocab_size: int, width: int) -> None:
    ids = [0, vocab_size - 1, 1]
    folder = make(tmp_path / "ds", ids, [0], vocab_size)
    dataset = open_dataset(folder)
    assert dataset.split("train").read(0, 3).tolist() == ids
    assert (folder / "train-00000.bin").stat().st_size == 3 * width
    assert (folder / "train-00000.bin").read_bytes()[width : 2 * width] == (vocab_size - 1).to_bytes(width, "little")
    for bad in (vocab_size, -1, 70_000 if vocab_size < 70_000 else 1 << 33):
        with ShardWriter(tmp_path, "val", vocab_size) as writer, pytest.raises(ValueError, match=f"token id {bad} is outside"):
            writer.add(np.array([0, bad]))


def test_facts(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), range(5))
    dataset = open_dataset(folder)
    assert dataset.path == folder
    assert dataset.vocab_size == 257
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.kind == "byte"
    train = dataset.manifest.train
    assert (train.tokens, train.documents, train.bytes, len(train.files)) == (20, 3, 20, 3)
    for file in train.files:
        assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256
    assert read_manifest(folder / "manifest.json") == replace(dataset.manifest)
    assert dataset.verify() == []


def test_fingerprint_is_of_the_data_alone(tmp_path: Path) -> None:
    seen = [
        open_dataset(make(tmp_path / name, ids, [1])).fingerprint for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [2, 1]))
    ]
    assert seen[0] == seen[1] != seen[2]
    assert open_dataset(make(tmp_path / "d", [1, 2], [1], vocab_size=300)).fingerprint != seen[0]


def edit(change: Callable[[dict[str, Any]], object], *, sign: bool) -> Callable[[Path], None]:
    """Damage a manifest; signed, its digest is made to fit again, as an attacker would."""

    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        if sign:
            content.pop("digest", None)
            packed = json.dumps(content, sort_keys=True, separators=(",", ":"))
            content["digest"] = hashlib.sha256(packed.encode()).hexdigest()
        path.write_text(json.dumps(content))

    return apply


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: os.truncate(d / "train-00001.bin", 13), r"train-00001.bin: has 13 bytes instead of 14"),
    (lambda d: (d / "val-00000.bin").unlink(), r"val-00000.bin: is missing"),
    (lambda d: (d / "manifest.json").unlink(), r"manifest.json: not found"),
    (lambda d: (d / "manifest.json").write_text("{"), r"manifest.json: is not JSON"),
    (lambda d: (d / "manifest.json").write_bytes(b"\xff"), r"manifest.json: is not JSON"),
    (lambda d: (d / "manifest.json").write_text("[" * 100_000), r"manifest.json: is not JSON"),
    (lambda d: (d / "manifest.json").write_text("[]"), r"holds no JSON object"),
    (edit(lambda c: c.update(vocab_size=300), sign=False), r"manifest.json: its digest does not fit"),
    (edit(lambda c: c.update(format=2), sign=True), r"format 2 is not the one read here"),
    (edit(lambda c: c.update(dtype="int8"), sign=True), r"dtype 'int8'"),
    (edit(lambda c: c.update(vocab_size=70_000), sign=True), r"vocabulary of 70000 does not fit uint16"),
    (edit(lambda c: c.update(vocab_size=-1), sign=True), r"vocab_size = -1 is not a count"),
    (edit(lambda c: c.pop("train"), sign=True), r"no valid manifest \('train'\)"),
    (edit(lambda c: c["train"].update(tokens=10**15), sign=True), r"do not hold 1000000000000000 tokens"),
    (edit(lambda c: c["train"]["files"][0].update(tokens=8), sign=True), r"8 tokens do not fill 14 bytes"),
    (edit(lambda c: c["train"]["files"][0].update(name="../secret.bin"), sign=True), r"'../secret.bin' is not a plain name"),
    (edit(lambda c: c["train"]["files"][0].update(name="/etc/passwd"), sign=True), r"is not a plain name"),
    (edit(lambda c: c["train"]["files"][0].update(tokens=True), sign=True), r"tokens = True is not a count"),
    (edit(lambda c: c.update(train=7), sign=True), r"no valid manifest"),
]


@pytest.mark.parametrize("case", range(len(DAMAGE)))
def test_damage_is_named_on_opening(tmp_path: Path, case: int) -> None:
    damage, message = DAMAGE[case]
    folder = make(tmp_path / "ds", range(20), range(5))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_within_a_file_is_found_by_verify_and_bad_ids_by_reading(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), range(5))
    with (folder / "train-00001.bin").open("r+b") as file:
        file.seek(2 * 2)
        file.write(b"\xff\xff")
    dataset = open_dataset(folder)
    assert dataset.verify() == [f"{folder / 'train-00001.bin'}: its checksum is not the manifest's"]
    split = dataset.split("train")
    assert split.read(0, 9).tolist() == list(range(9))
    with pytest.raises(UserError, match=r"train-00001.bin: token 2 is 65535, outside the vocabulary of 257"):
        split.read(5, 10)
    os.truncate(folder / "train-00001.bin", 5)
    with pytest.raises(UserError, match=r"train-00001.bin: ends within token 2"):
        split.read(5, 9)
    (folder / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001.bin: cannot read: no such file"):
        split.read(5, 9)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), range(5))
    build_tokenizer("char", ["abc"]).save(folder)
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match=r"tokenizer.json: has fingerprint"):
        _ = dataset.tokenizer
    assert "tokenizer.json" in dataset.verify()[0]


def test_threads_share_a_split_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 5000)
    split = open_dataset(make(tmp_path / "ds", ids, [0], shard_tokens=500)).split("train")
    wrong = []

    def work(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, 4000, 100).tolist():
            if not np.array_equal(split.read(start, 700), ids[start : start + 700]):
                wrong.append(start)

    open_before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if open_before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_before
