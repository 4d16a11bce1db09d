"""Dataset folders: tokens are read back as written, and errors name truncated, changed or damaged files."""

import errno
import hashlib
import io
import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.tokens.manifest import Manifest, read_manifest, write_manifest
from bardling.data.tokens.shards import ShardWriter, open_dataset, token_dtype
from bardling.data.tokens.tokenizer import build_tokenizer
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
    (lambda d: (d / "manifest.json").write_text("{"), r"manifest.json: is not valid JSON"),
    (lambda d: (d / "manifest.json").write_bytes(b"\xff"), r"manifest.json: is not valid JSON"),
    (lambda d: (d / "manifest.json").write_text("[" * 100_000), r"manifest.json: is not valid JSON"),
    (lambda d: (d / "manifest.json").write_text("[]"), r"is not a JSON object"),
    (edit(lambda c: c.update(vocab_size=300), sign=False), r"manifest.json: its digest does not match"),
    (edit(lambda c: c.update(format=2), sign=True), r"format 2 is not supported"),
    (edit(lambda c: c.update(dtype="int8"), sign=True), r"dtype 'int8'"),
    (edit(lambda c: c.update(vocab_size=70_000), sign=True), r"vocabulary of 70000 does not fit uint16"),
    (edit(lambda c: c.update(vocab_size=-1), sign=True), r"vocab_size = -1 is not a count"),
    (edit(lambda c: c.pop("train"), sign=True), r"not a valid manifest \('train'\)"),
    (edit(lambda c: c["train"].update(tokens=10**15), sign=True), r"do not add up to 1000000000000000 tokens"),
    (edit(lambda c: c["train"]["files"][0].update(tokens=8), sign=True), r"8 tokens do not fill 14 bytes"),
    (edit(lambda c: c["train"]["files"][0].update(name="../secret.bin"), sign=True), r"'../secret.bin' is not a plain name"),
    (edit(lambda c: c["train"]["files"][0].update(name="/etc/passwd"), sign=True), r"is not a plain name"),
    (edit(lambda c: c["train"]["files"][0].update(tokens=True), sign=True), r"tokens = True is not a count"),
    (edit(lambda c: c.update(train=7), sign=True), r"not a valid manifest"),
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
    assert dataset.verify() == [f"{folder / 'train-00001.bin'}: its checksum does not match the manifest"]
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


# --- positions --------------------------------------------------------------------------------------------------------


def test_every_range_reads_like_a_slice(tmp_path: Path) -> None:
    ids = list(range(100, 120))
    split = open_dataset(make(tmp_path / "ds", ids, [1])).split("train")
    for start in range(-1, 22):
        for count in range(-1, 22):
            if start < 0 or count < 0 or start + count > len(ids):
                with pytest.raises(ValueError, match=f"tokens {start} to {start + count} are not within the split's 20"):
                    split.read(start, count)
            else:
                assert split.read(start, count).tolist() == ids[start : start + count]


def test_place_names_the_file_and_the_index_in_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(100, 120), [1])
    split = open_dataset(folder).split("train")
    for position in range(20):
        name, index = split.place(position)
        assert np.fromfile(folder / name, "<u2")[index] == 100 + position
    for position in (-1, 20):
        with pytest.raises(ValueError, match=f"token {position} is not within the split's 20"):
            split.place(position)


def test_a_split_without_tokens_has_length_zero(tmp_path: Path) -> None:
    split = open_dataset(make(tmp_path / "ds", range(20), [])).split("val")
    assert len(split) == 0
    assert split.read(0, 0).tolist() == []
    with pytest.raises(ValueError, match="not within"):
        split.read(0, 1)


def test_a_file_without_tokens_is_skipped(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), [1])
    (folder / "empty.bin").touch()
    entry = {"name": "empty.bin", "tokens": 0, "size": 0, "sha256": hashlib.sha256().hexdigest(), "offset": 0}
    edit(lambda c: c["train"]["files"].insert(1, entry), sign=True)(folder)
    dataset = open_dataset(folder)
    assert dataset.verify() == []
    assert dataset.split("train").read(3, 12).tolist() == list(range(3, 15))
    assert dataset.split("train").place(7) == ("train-00001.bin", 0)


def test_tokens_may_follow_a_header(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), [1])
    path = folder / "train-00001.bin"
    path.write_bytes(b"header" + path.read_bytes())
    edit(lambda c: c["train"]["files"][1].update(offset=6, size=20, sha256=""), sign=True)(folder)
    dataset = open_dataset(folder)
    assert dataset.verify() == []  # there is no checksum to compare with
    assert dataset.split("train").read(3, 12).tolist() == list(range(3, 15))


def test_reads_continue_when_the_system_returns_fewer_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for requests above 2 GB and on some network file systems."""
    split = open_dataset(make(tmp_path / "ds", range(40), [1], shard_tokens=20)).split("train")
    real_open, reads = io.open, []

    class Trickle(io.FileIO):
        def read(self, size: int | None = -1) -> Any:
            reads.append(size)
            return super().read(size if size is None or size < 0 else min(size, 3))

        def readinto(self, buffer: Any) -> Any:
            reads.append(len(buffer))
            return super().readinto(memoryview(buffer)[:3])

    def trickling_open(path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not str(path).endswith(".bin"):
            return real_open(path, mode, buffering, *args, **kwargs)
        raw = Trickle(path, mode)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(io, "open", trickling_open)
    for count in range(1, 40):
        assert split.read(1, count).tolist() == list(range(1, 1 + count))
    assert reads


# --- damage after opening ---------------------------------------------------------------------------------------------


def test_an_id_equal_to_the_vocabulary_size_is_rejected(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(280, 300), [1], vocab_size=300)
    split = open_dataset(folder).split("train")
    assert split.read(0, 20).tolist() == list(range(280, 300))  # 299 is the largest valid id
    with (folder / "train-00001.bin").open("r+b") as file:
        file.seek(3 * 2)
        file.write((300).to_bytes(2, "little"))
    with pytest.raises(UserError, match=r"train-00001.bin: token 3 is 300, outside the vocabulary of 300"):
        split.read(8, 5)


def test_a_file_cut_after_opening_is_reported_with_the_first_missing_token(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(20), [1])
    split = open_dataset(folder).split("train")
    os.truncate(folder / "train-00001.bin", 5 * 2 + 1)
    assert split.read(7, 5).tolist() == list(range(7, 12))
    with pytest.raises(UserError, match=r"train-00001.bin: ends within token 5"):
        split.read(9, 4)


def test_verify_lists_every_problem(tmp_path: Path) -> None:
    folder = make(tmp_path / "ds", range(30), range(5))
    dataset = open_dataset(folder)
    missing, cut, directory, pipe = (folder / f"train-{number:05d}.bin" for number in range(4))
    for path in (missing, directory, pipe):
        path.unlink()
    os.truncate(cut, 13)
    directory.mkdir()
    os.mkfifo(pipe)
    (folder / "val-00000.bin").write_bytes(bytes(10))
    (folder / "tokenizer.json").unlink()
    problems = dataset.verify()
    assert problems[:5] == [
        f"{missing}: {os.strerror(errno.ENOENT).lower()}",
        f"{cut}: has 13 bytes instead of 14",
        f"{directory}: is not a file",
        f"{pipe}: is not a file",
        f"{folder / 'val-00000.bin'}: its checksum does not match the manifest",
    ]
    assert len(problems) == 6
    assert "tokenizer.json" in problems[5]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_files_are_filled_whatever_the_sizes_of_the_parts(tmp_path: Path) -> None:
    ids = np.arange(20)
    with ShardWriter(tmp_path, "train", 300, shard_tokens=7) as writer:
        for part in np.split(ids, [3, 3, 4, 16]):
            writer.add(part)
        info = writer.finish()
    assert [(file.name, file.tokens, file.size) for file in info.files] == [
        ("train-00000.bin", 7, 14),
        ("train-00001.bin", 7, 14),
        ("train-00002.bin", 6, 12),
    ]
    written = np.concatenate([np.fromfile(tmp_path / file.name, "<u2") for file in info.files])
    assert written.tolist() == ids.tolist()
    assert (info.tokens, info.documents, info.bytes) == (20, 5, 0)  # an empty document counts; no bytes were given


def test_nothing_added_makes_no_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", 300) as writer:
        info = writer.finish()
    assert (info.tokens, info.documents, info.bytes, info.files) == (0, 0, 0, ())
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_the_vocabulary_is_not_an_id(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val", 300) as writer:
        writer.add(np.array([0, 299]))
        for bad in (300, -1):
            with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 300"):
                writer.add(np.array([1, bad, 500]))
        info = writer.finish()
    assert info.tokens == 2


def test_written_bytes_reach_the_disk_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync` and the end of each file call fsync when the file already has all its bytes."""
    synced: dict[int, int] = {}  # inode -> size when it was last synced
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def synced_size(name: str) -> int | None:
        return synced.get((tmp_path / name).stat().st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with ShardWriter(tmp_path, "train", 300, shard_tokens=7) as writer:
        writer.add(np.arange(10))
        assert synced_size("train-00000.bin") == 14
        writer.sync()
        assert synced_size("train-00001.bin") == 6
        writer.add(np.arange(2))
        writer.finish()
        assert synced_size("train-00001.bin") == 10


def write_and_fail(folder: Path) -> None:
    with ShardWriter(folder, "train", 300) as writer:
        writer.add(np.arange(5))
        writer.add(np.array([300]))


def test_files_are_closed_explicitly_and_no_warning_is_raised(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = open_dataset(make(tmp_path / "ds", range(20), range(5)))
        assert dataset.split("train").read(3, 12).tolist() == list(range(3, 15))
        assert dataset.verify() == []
        with pytest.raises(ValueError, match="outside"):
            write_and_fail(tmp_path)
    assert [str(warning.message) for warning in caught] == []


# --- continuing an interrupted writer ---------------------------------------------------------------------------------

PARTS = np.split(np.arange(100, 117), [3, 4, 10, 12, 16])  # in files of 4 tokens: state within a file and at its end


def write_parts(writer: ShardWriter, parts: list[Any]) -> None:
    for part in parts:
        writer.add(part, documents=2, text_bytes=5)


@pytest.mark.parametrize("killed_later", [False, True])
@pytest.mark.parametrize("done", range(len(PARTS) + 1))
def test_a_restored_writer_writes_what_an_uninterrupted_one_does(tmp_path: Path, done: int, killed_later: bool) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    with ShardWriter(whole, "train", 300, 4) as writer:
        write_parts(writer, PARTS)
        expected = writer.finish()
    (resumed / "val-00000.bin").write_text("the other split")
    with ShardWriter(resumed, "train", 300, 4) as writer:
        write_parts(writer, PARTS[:done])
        state = json.loads(json.dumps(writer.sync()))
        if killed_later:
            writer.add(np.full(9, 299))  # written after the state was saved: must not survive
    with ShardWriter(resumed, "train", 300, 4) as writer:
        writer.restore(state)
        write_parts(writer, PARTS[done:])
        assert writer.finish() == expected
    assert {path.name: path.read_bytes() for path in resumed.glob("train-*")} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert (resumed / "val-00000.bin").read_text() == "the other split"


def test_sync_makes_the_tokens_readable(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 300, 4) as writer:
        writer.add(np.arange(6))
        writer.sync()
        assert np.fromfile(tmp_path / "train-00001.bin", "<u2").tolist() == [4, 5]


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00001.bin"])  # a complete file and the one begun
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_restore_rejects_a_missing_or_cut_file(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    with ShardWriter(tmp_path, "train", 300, 4) as writer:
        writer.add(np.arange(6))
        state = writer.sync()
    damage(tmp_path / name)
    with (
        ShardWriter(tmp_path, "train", 300, 4) as writer,
        pytest.raises(UserError, match=rf"{name}: is missing or truncated: remove the folder"),
    ):
        writer.restore(state)
