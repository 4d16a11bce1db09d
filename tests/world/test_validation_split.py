"""The validation split consists of whole documents, for two as for a thousand, and a run keeps the split it started with."""

import json
import random
import shutil

import pytest

from bardling.config import DataConfig
from bardling.data.tokens import dataset as dataset_module
from bardling.data.tokens.dataset import open_data, open_recorded
from bardling.data.tokens.prepare import held_out, prepare
from bardling.errors import UserError


def make(folder, texts, spec="byte", **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(str(path), folder / f"ds{len(list(folder.iterdir()))}", spec, **options)


def documents(dataset, split):
    """The documents of a split; each must end with the end-of-text token."""
    tokens, end = dataset.split(split), dataset.tokenizer.eot_id
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids[-1] == end
    found, text = [], []
    for token in ids:
        if token == end:
            found.append(dataset.tokenizer.decode(text))
            text = []
        else:
            text.append(token)
    return found


def words(seed: int, characters: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("abcdef ghi\n") for _ in range(characters))


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "sizes",
    [
        (10, 10),
        (10_000, 10),
        (10, 10_000),
        (1, 2),
        (6000, 5000),
        (50, 4000, 4000),
        (1, 1, 1, 20_000),
        (300,) * 7,
        (100,) * 30,
        tuple(range(1, 99)),
        (5,) * 98 + (9000,),
        (20,) * 100,
        (7,) * 150,
    ],
)
def test_every_document_is_whole_and_in_one_split(tmp_path, sizes, fraction):
    texts = [f"{number} {words(number, size)}" for number, size in enumerate(sizes)]
    dataset = make(tmp_path, texts, val_fraction=fraction)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)], "the order stays"
    assert min(len(train), len(val)) >= 1
    assert dataset.manifest.source["split_rule"] == 2


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("sizes", [(9000, 1000), (1000, 9000), (5100, 4900), (100, 101)])
def test_of_two_documents_the_shorter_one_is_held_out(tmp_path, sizes, fraction):
    texts = [words(number, size) for number, size in enumerate(sizes)]
    dataset = make(tmp_path, texts, val_fraction=fraction)
    assert documents(dataset, "val") == [min(texts, key=len)]


@pytest.mark.parametrize("count", [10, 20, 50, 99])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2])
def test_the_fraction_is_kept_within_a_document(tmp_path, count, fraction):
    texts = [words(number, 400 + number) for number in range(count)]
    dataset = make(tmp_path, texts, val_fraction=fraction)
    held = sum(map(len, documents(dataset, "val")))
    total = sum(map(len, texts))
    assert fraction * total / 2 <= held <= max(fraction * total, 500)


def test_a_short_document_among_long_ones_is_not_all_of_the_validation(tmp_path):
    texts = ["A short note about the books.", words(1, 50_000), words(2, 50_000), words(3, 50_000)]
    dataset = make(tmp_path, texts)
    assert len(dataset.split("val")) > 50_000
    assert len(dataset.split("train")) >= 100_000


@pytest.mark.parametrize("count", [2, 5, 99, 130])
def test_copies_stay_together(tmp_path, count):
    texts = [words(1, 300)] * count + [words(2, 200)] * 3
    dataset = make(tmp_path, texts)
    assert not set(documents(dataset, "train")) & set(documents(dataset, "val"))


@pytest.mark.parametrize("count", [2, 99, 120])
def test_copies_of_a_single_text_are_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"all {count} documents are the same text"):
        make(tmp_path, ["the same text again"] * count)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3333])
@pytest.mark.parametrize("size", [2, 11, 1234, 5001])
@pytest.mark.parametrize("name", ["one.txt", "rows.jsonl"])
def test_a_single_document_is_cut_as_in_nanogpt(tmp_path, size, fraction, name):
    text = words(size, size).replace("\n", "n")
    (tmp_path / name).write_text(text if name == "one.txt" else json.dumps({"text": text}))
    dataset = prepare(str(tmp_path / name), tmp_path / "ds", "byte", val_fraction=fraction)
    cut = int(size * (1 - fraction))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert bytes(dataset.split(split).read(0, len(dataset.split(split))).tolist()) == part.encode()


def test_many_documents_are_split_as_before(tmp_path):
    texts = [words(number, 50) for number in range(200)]
    old, new = (make(tmp_path, texts, split_rule=rule, val_fraction=0.1) for rule in (1, 2))
    assert old.fingerprint == new.fingerprint
    assert documents(new, "val") == [text for text in texts if held_out(text, 0.1)]


def test_rule_1_cuts_each_document_as_before(tmp_path):
    texts = ["".join(f"line {i} of {name}\n" for i in range(100)) for name in "ab"]
    dataset = make(tmp_path, texts, val_fraction=0.25, split_rule=1)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    assert all(part.endswith("\n") for part in train)
    assert dataset.manifest.source["split_rule"] == 1


def test_a_run_keeps_its_rule_when_its_dataset_is_prepared_again(tmp_path):
    for name in "ab":
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{name}.txt").write_text(words(ord(name), 3000))
    config = DataConfig(source=str(tmp_path / "src"), cache=str(tmp_path / "cache"))
    old = open_data(config, 1)
    record = {"path": str(old.path), "fingerprint": old.fingerprint}  # as versions with a single rule wrote it
    assert open_data(config).fingerprint != old.fingerprint
    assert open_recorded(config, record, tmp_path / "run").path == old.path
    shutil.rmtree(tmp_path / "cache")
    assert open_recorded(config, record, tmp_path / "run").fingerprint == old.fingerprint
    with pytest.raises(UserError, match="is not the dataset that"):
        open_recorded(config, {"fingerprint": old.fingerprint, "split_rule": 2}, tmp_path / "run")


def test_a_recorded_dataset_is_opened_although_text_and_tokenizer_are_gone(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(words(1, 3000))
    config = DataConfig(source=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"))
    made = open_data(config)
    (tmp_path / "a.txt").unlink()
    monkeypatch.setattr(dataset_module, "source_for", None)
    record = {"path": str(made.path), "fingerprint": made.fingerprint, "split_rule": 2}
    assert open_recorded(config, record, tmp_path / "run").path == made.path
