"""Preparing: the split stays put, folders appear whole or not at all, and the cache is shared safely."""

import json
import multiprocessing
import os
import random
import threading
from pathlib import Path

import pytest

from bardling.config import DataConfig
from bardling.data.tokens import dataset as dataset_module
from bardling.data.tokens import prepare as prepare_module
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.journal import working_on
from bardling.data.tokens.prepare import held_out, prepare
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from bardling.errors import UserError


def documents_of(dataset: TokenDataset, split: str) -> list[str]:
    """The documents of a split, cut at the end-of-text token."""
    tokens = dataset.split(split)
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    out: list[list[int]] = [[]]
    for token in tokens.read(0, len(tokens)).tolist():
        if token == tokenizer.eot_id:
            out.append([])
        else:
            out[-1].append(token)
    return [tokenizer.decode(ids) for ids in out]


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TEXTS = [f"document {i}: " + "word " * (i % 7) + "\n" for i in range(300)]


def test_many_documents_are_held_out_whole_by_their_content(tmp_path: Path) -> None:
    dataset = prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "ds", "byte", val_fraction=0.2)
    *train, after_train = documents_of(dataset, "train")
    *val, after_val = documents_of(dataset, "val")
    assert after_train == after_val == ""  # the end-of-text token stands after each document
    assert train == [text for text in TEXTS if not held_out(text, 0.2)]
    assert val == [text for text in TEXTS if held_out(text, 0.2)]
    assert 30 < len(val) < 90
    manifest = dataset.manifest
    assert (manifest.train.documents, manifest.val.documents) == (len(train), len(val))
    assert manifest.val.bytes == sum(len(text.encode()) for text in val) == manifest.val.tokens - len(val)


def test_adding_files_and_copies_moves_no_document(tmp_path: Path) -> None:
    first = prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "one", "byte", val_fraction=0.1)
    more = [f"new {i}" for i in range(100)] + TEXTS[::-1] + TEXTS[:50]
    second = prepare(str(rows(tmp_path / "b.jsonl", more)), tmp_path / "two", "byte", val_fraction=0.1)
    held = set(documents_of(first, "val"))
    assert held <= set(documents_of(second, "val"))
    assert not (set(documents_of(second, "val")) & set(documents_of(second, "train"))) - {""}


def test_a_single_file_is_cut_by_position_as_in_nanogpt(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choice("abcé \n") for _ in range(1234))
    (tmp_path / "input.txt").write_text(text, newline="")
    for spec in ("char", "byte"):
        dataset = prepare(str(tmp_path / "input.txt"), tmp_path / spec, spec, val_fraction=0.1)
        assert documents_of(dataset, "train") == [text[: int(1234 * 0.9)]]
        assert documents_of(dataset, "val") == [text[int(1234 * 0.9) :]]
    assert dataset.manifest.train.documents == dataset.manifest.val.documents == 1


def test_few_documents_are_each_cut_at_a_line_by_rule_1(tmp_path: Path) -> None:
    texts = ["".join(f"line {i} of {name}\n" for i in range(100)) for name in "ab"] + ["no line break " * 100]
    dataset = prepare(str(rows(tmp_path / "a.jsonl", texts)), tmp_path / "ds", "char", val_fraction=0.25, split_rule=1)
    train, val = documents_of(dataset, "train"), documents_of(dataset, "val")
    assert [a + b for a, b in zip(train, val, strict=True)] == [*texts, ""]
    assert all(part.endswith("\n") for part in train[:2])
    assert all(0.2 < len(part) / len(text) < 0.3 for part, text in zip(val, texts, strict=False))


def test_bpe_is_trained_on_the_training_split_only(tmp_path: Path) -> None:
    texts = ["aa " * 50 + str(i) if not held_out("aa " * 50 + str(i), 0.3) else "" for i in range(200)]
    secret = next(text for text in (f"{'qz' * 40} {i}" for i in range(99)) if held_out(text, 0.3))
    dataset = prepare(str(rows(tmp_path / "a.jsonl", [*texts, secret])), tmp_path / "ds", "bpe:300", val_fraction=0.3)
    assert documents_of(dataset, "val") == [secret, ""]
    assert dataset.tokenizer is not None
    assert len(dataset.tokenizer.encode("qzqzqzqz")) == 8
    assert len(dataset.tokenizer.encode(" aa aa")) < 6


def test_shards_are_cut_and_read_as_one(tmp_path: Path) -> None:
    dataset = prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "ds", "byte", val_fraction=0.2, shard_tokens=1000)
    assert len(dataset.manifest.train.files) > 3
    assert documents_of(dataset, "train")[:-1] == [text for text in TEXTS if not held_out(text, 0.2)]
    assert dataset.verify() == []


def test_refuses_to_overwrite_and_bad_input(tmp_path: Path) -> None:
    source = str(rows(tmp_path / "a.jsonl", TEXTS))
    (tmp_path / "there").mkdir()
    for out, spec, fraction, message in (
        ("there", "byte", 0.1, "already exists"),
        ("new", "bite", 0.1, "did you mean 'byte'"),
        ("new", "byte", 1.5, "must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / out, spec, val_fraction=fraction)
    with pytest.raises(UserError, match="no such file"):
        prepare(str(tmp_path / "nothing.txt"), tmp_path / "new", "byte")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "there"]
    (tmp_path / ".there.partial").mkdir()
    (tmp_path / ".there.partial" / "journal.json").write_text("{}")
    with pytest.raises(UserError, match=r"there: already exists"):
        prepare(source, tmp_path / "there", "byte")
    with pytest.raises(UserError, match=r"there: already exists"), working_on(tmp_path / "there"):
        pass
    assert [path.name for path in (tmp_path / ".there.partial").iterdir()] == ["journal.json"], "an earlier attempt is kept"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("bug")])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> list[object]:
        raise error

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    expected = UserError if isinstance(error, OSError) else error if isinstance(error, type) else type(error)
    with pytest.raises(expected, match="no space left" if isinstance(error, OSError) else None):
        prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "deep" / "ds", "byte")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    source = str(rows(tmp_path / "a.jsonl", TEXTS))
    (tmp_path / "ro").mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"ro.*permission denied"):
        prepare(source, tmp_path / "ro" / "ds", "byte")


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "ds", "bpe:300", progress=lambda *args: told.append(args))
    assert {doing for doing, _, _ in told} == {"training the tokenizer", "tokenizing"}
    assert told[-1][1] == sum(map(len, TEXTS))
    assert told[-1][2] == (tmp_path / "a.jsonl").stat().st_size


def config_for(tmp_path: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"source": str(tmp_path / "a.jsonl"), "cache": str(tmp_path / "cache"), **changes})  # type: ignore[arg-type]


def test_the_cache_is_used_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "a.jsonl", TEXTS)
    first = open_data(config_for(tmp_path))
    monkeypatch.setattr(dataset_module, "prepare", None)  # a second preparation would fail
    assert open_data(config_for(tmp_path)).path == first.path
    monkeypatch.undo()
    others = [
        open_data(config_for(tmp_path, tokenizer="char")),
        open_data(config_for(tmp_path, val_fraction=0.1)),
        open_data(config_for(tmp_path, tokenizer=str(first.path / "tokenizer.json"))),
    ]
    rows(tmp_path / "a.jsonl", TEXTS[1:])
    others.append(open_data(config_for(tmp_path)))
    assert len({first.path, *(dataset.path for dataset in others)}) == 5
    assert others[2].fingerprint == first.fingerprint  # the same tokens by another way
    monkeypatch.setenv("BARDLING_CACHE", str(tmp_path / "env"))
    assert (tmp_path / "env") in open_data(config_for(tmp_path, cache="")).path.parents


def test_a_damaged_cached_dataset_says_what_to_remove(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", TEXTS)
    path = open_data(config_for(tmp_path)).path
    os.truncate(path / "train-00000.bin", 10)
    with pytest.raises(UserError, match=r"remove .*, and it is prepared again"):
        open_data(config_for(tmp_path))


def test_a_cache_that_cannot_be_written_says_which_setting(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cache is a file, not a folder.*BARDLING_CACHE") as caught:
        open_data(config_for(tmp_path))
    assert "\n" not in str(caught.value)


def _prepare_in_process(config: DataConfig, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put(open_data(config).fingerprint)  # type: ignore[attr-defined]


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", TEXTS)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_prepare_in_process, args=(config_for(tmp_path, tokenizer="bpe:300"), barrier, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    seen = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(300)
    assert seen[0] == seen[1]
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_who_comes_second_waits_and_takes_the_firsts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(tmp_path / "a.jsonl", TEXTS)
    real = prepare_module._write
    config = config_for(tmp_path)
    made, second = [], []

    def slow(*args: object) -> object:
        made.append(1)
        if len(made) == 1:
            other.start()
            other.join(0.3)  # it waits all this time
            assert other.is_alive()
        return real(*args)  # type: ignore[arg-type]

    other = threading.Thread(target=lambda: second.append(open_data(config)))
    monkeypatch.setattr(prepare_module, "_write", slow)
    dataset = open_data(config)
    other.join(300)
    assert second[0].fingerprint == dataset.fingerprint
    assert dataset.verify() == []
    assert len(made) == 1
    assert [path.name for path in dataset.path.parent.iterdir()] == [dataset.path.name]


def test_a_prepared_folder_is_opened_and_another_tokenizer_refused(tmp_path: Path) -> None:
    made = prepare(str(rows(tmp_path / "a.jsonl", TEXTS)), tmp_path / "ds", "bpe:300")
    for tokenizer in ("byte", str(tmp_path / "ds"), str(tmp_path / "ds" / "tokenizer.json")):
        assert open_data(DataConfig(source=str(tmp_path / "ds"), tokenizer=tokenizer)).fingerprint == made.fingerprint
    (tmp_path / "other").mkdir()
    build_tokenizer("byte", ()).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"has fingerprint .* was made with"):
        open_data(DataConfig(source=str(tmp_path / "ds"), tokenizer=str(tmp_path / "other")))
    assert load_tokenizer(tmp_path / "ds").kind == "bpe"
