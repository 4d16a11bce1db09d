"""Parts of a source, prepared apart and merged, are the dataset of a single preparation, to the byte."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bardling.data.text.named_datasets import source_for
from bardling.data.text.parts import Shard, parse_shard, part_of
from bardling.data.tokens.journal import work_folder
from bardling.data.tokens.manifest import read_manifest, write_manifest
from bardling.data.tokens.merge import merge
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import open_dataset
from bardling.errors import UserError

WORDS = ["king", "queen", "rose", "été", "日本", "🙂", "x" * 40, "\n\n", "  ", "<|endoftext|>", "\0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A file of 300 documents, and some rows without text."""
    draw = random.Random(5)
    path = tmp_path_factory.mktemp("rows") / "text.jsonl"
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 90))) if number % 10 else None for number in range(333)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of 40 files, some of them empty, binary or large."""
    draw = random.Random(6)
    folder = tmp_path_factory.mktemp("files") / "text"
    folder.mkdir()
    for number in range(40):
        size = 0 if number % 9 == 4 else 4000 if number in (7, 8) else draw.randrange(5, 90)
        text = "\1" * 900 if number % 11 == 5 else " ".join(draw.choices(WORDS, k=size))
        (folder / f"{number:02d}.txt").write_text(text)
    (folder / ".hidden").write_text("x")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def parts_of(source: Path, out: Path, count: int, **settings) -> list[Path]:
    folders = [out / f"part{number}of{count}" for number in range(1, count + 1)]
    for number, folder in enumerate(folders, 1):
        prepare(str(source), folder, "byte", val_fraction=0.2, shard_tokens=3000, shard=Shard(number, count), **settings)
    return folders


@pytest.mark.parametrize(("kind", "count"), [("rows", 1), ("rows", 3), ("files", 3), ("files", 8), ("files", 60)])
def test_merged_parts_are_a_single_preparation(request, tmp_path, kind, count):
    source = request.getfixturevalue(kind)
    prepare(str(source), tmp_path / "whole", "byte", val_fraction=0.2, shard_tokens=3000)
    folders = parts_of(source, tmp_path, count)
    random.Random(count).shuffle(folders)
    merged = merge(folders, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) > 9
    assert merged.verify() == []
    assert not work_folder(tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["rows", "files"])
def test_parts_are_the_source(request, kind):
    source = source_for(str(request.getfixturevalue(kind)))
    whole = list(source.documents())
    for count in (1, 2, 7, 39, 60):
        parts = [list(part_of(source, Shard(number, count)).documents()) for number in range(1, count + 1)]
        assert [document for part in parts for document in part] == whole
    assert len(list(part_of(source, Shard(1, 2)).documents())) not in (0, len(whole))


def test_a_part_of_many_files_reads_only_its_own(files, monkeypatch):
    source = source_for(str(files))
    seen = []
    read = type(source)._read
    monkeypatch.setattr(type(source), "_read", lambda self, path: seen.append(path.name) or read(self, path))
    for number in range(1, 4):
        list(part_of(source, Shard(number, 3)).documents())
    assert seen == [f"{number:02d}.txt" for number in range(40)]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "1/2/3", "a/b", "-1/3", "1/200000", ""])
def test_bad_shards_are_refused(text):
    with pytest.raises(UserError, match=r"--shard .*: names no part: use I/N with I from 1 to N"):
        parse_shard(text)


def test_a_shard_is_parsed():
    assert parse_shard("3/8") == Shard(3, 8)


@pytest.mark.parametrize("spec", ["char", "bpe:300"])
def test_a_vocabulary_that_depends_on_the_text_is_refused(rows, tmp_path, spec):
    with pytest.raises(UserError, match=f"--shard 1/2 --tokenizer {spec}: each part would get a vocabulary of its own"):
        prepare(str(rows), tmp_path / "part", spec, shard=Shard(1, 2))
    assert not list(tmp_path.iterdir())


def test_a_single_document_has_no_parts(tmp_path):
    (tmp_path / "text.txt").write_text("one document " * 100)
    with pytest.raises(UserError, match="is a single document, which has no parts: omit --shard"):
        prepare(str(tmp_path / "text.txt"), tmp_path / "part", "byte", shard=Shard(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_parts_that_do_not_belong_together_are_refused(rows, files, tmp_path):
    one, two, three = parts_of(rows, tmp_path, 3)
    other = parts_of(files, tmp_path / "other", 3)[1]
    of_two = parts_of(rows, tmp_path, 2)[0]
    prepare(str(rows), tmp_path / "whole", "byte", val_fraction=0.2)
    prepare(str(rows), tmp_path / "fraction", "byte", val_fraction=0.3, shard_tokens=3000, shard=Shard(2, 3))
    prepare(str(rows), tmp_path / "longer", "byte", val_fraction=0.2, shard_tokens=4000, shard=Shard(2, 3))
    for folders, message in (
        ((), "no parts to merge"),
        ((one, three), r"parts are missing: 2 of 3: prepare them with --shard 2/3"),
        ((one, two, three, two), "is part 2, and so is"),
        ((one, other, three), "part2of3: does not belong to .*part1of3: it has another text"),
        ((one, of_two), "has another number of parts"),
        ((one, tmp_path / "fraction", three), "has another val_fraction"),
        ((one, tmp_path / "longer", three), "has another number of tokens per file"),
        ((one, tmp_path / "whole", three), "whole: is not a part: only what `bardling prepare --shard I/N` has made"),
        ((one, tmp_path / "nothing"), "not found, so .*nothing is not a prepared dataset"),
    ):
        with pytest.raises(UserError, match=message):
            merge(folders, tmp_path / "merged")
    with pytest.raises(UserError, match="whole: already exists"):
        merge((one, two, three), tmp_path / "whole")
    assert not (tmp_path / "merged").exists()
    assert not work_folder(tmp_path / "merged").exists()


def test_a_damaged_part_is_refused(rows, tmp_path):
    folders = parts_of(rows, tmp_path, 2)
    tokens = folders[1] / "train-00000.bin"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    with pytest.raises(UserError, match=r"train-00000\.bin: its checksum does not match the manifest: prepare this part again"):
        merge(folders, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("facts", [None, 3, {}, {"number": 1}, {"number": "1", "count": 2, "shard_tokens": 9}])
def test_a_manifest_with_other_facts_is_no_part(rows, tmp_path, facts):
    folders = parts_of(rows, tmp_path, 2)
    manifest = read_manifest(folders[0] / "manifest.json")
    write_manifest(folders[0], replace(manifest, source={**manifest.source, "part": facts}))
    with pytest.raises(UserError, match="part1of2: is not a part"):
        merge(folders, tmp_path / "merged")


def test_an_interrupted_merge_leaves_nothing(rows, tmp_path, monkeypatch):
    folders = parts_of(rows, tmp_path, 2)
    calls = []

    def progress(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(folders, tmp_path / "merged", progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part1of2", "part2of2"]
    merge(folders, tmp_path / "merged")


def test_a_part_is_recognisable(rows, tmp_path, capsys):
    from bardling.cli.main import main

    main(["prepare", str(rows), "--out", str(tmp_path / "part"), "--shard", "2/3"])
    assert "2 of 3, to be joined with `bardling data merge`" in capsys.readouterr().out
    assert open_dataset(tmp_path / "part").manifest.source["part"]["number"] == 2
    with pytest.raises(SystemExit) as end:
        main(["data", "merge", str(tmp_path / "part"), "--out", str(tmp_path / "merged")])
    assert end.value.code == 2
    assert "parts are missing: 1, 3 of 3" in capsys.readouterr().err


def test_an_interrupted_part_resumes(rows, tmp_path, monkeypatch):
    from bardling.data.tokens import journal
    from bardling.data.tokens import prepare as prepare_module

    monkeypatch.setattr(prepare_module, "_BATCH", 2000)
    whole = parts_of(rows, tmp_path / "whole", 2)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    calls = []

    def progress(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts_of(rows, tmp_path / "parts", 2, progress=progress)
    assert (work_folder(tmp_path / "parts" / "part1of2") / "journal.json").is_file()
    for part, expected in zip(parts_of(rows, tmp_path / "parts", 2), whole, strict=True):
        assert content(part) == content(expected)
