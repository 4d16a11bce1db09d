"""A cached dataset is used only if all that determines its ids is the same, and runs inside their source folder resume."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bardling import resume, train
from bardling.config import DataConfig
from bardling.data.text.folders import CACHE_TAG, files_below, made_folder
from bardling.data.text.sources import open_source
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError

TEXT = "The King and the Queen met <b> seven times.\n"


def library() -> Library:
    made = Library(models.BPE({character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<a>", "<z>"])
    return made


def save(made: Library, folder: Path, eos: object = "<a>") -> None:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name} {TEXT}" * 40)
    return folder


def all_ids(dataset) -> list[int]:
    return [token for split in ("train", "val") for token in dataset.split(split).read(0, len(dataset.split(split))).tolist()]


def other_eos(made, folder):
    save(made, folder, "<z>")


def other_eos_as_object(made, folder):
    save(made, folder, {"content": "<z>", "special": True})


def another_added_token(made, folder):
    made.add_tokens(["<b>"])
    save(made, folder)


def a_normalizer(made, folder):
    made.normalizer = normalizers.Lowercase()
    save(made, folder)


def a_prefix_space(made, folder):
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    save(made, folder)


@pytest.mark.parametrize("changed", [other_eos, other_eos_as_object, another_added_token, a_normalizer, a_prefix_space])
def test_a_changed_tokenizer_is_not_taken_from_the_cache(tmp_path, source, changed):
    save(library(), tmp_path / "tok")
    config = DataConfig(source=str(source), tokenizer=str(tmp_path / "tok"), cache=str(tmp_path / "cache"))
    first = open_data(config)
    assert open_data(config).path == first.path
    changed(library(), tmp_path / "tok")
    second = open_data(config)
    assert second.path != first.path
    fresh = prepare(str(source), tmp_path / "fresh", str(tmp_path / "tok"))
    assert all_ids(second) == all_ids(fresh)


@pytest.mark.parametrize("change", [{"val_fraction": 0.3}, {"encoding": "latin-1"}, {"tokenizer": "char"}])
def test_changed_settings_are_not_taken_from_the_cache(tmp_path, source, change):
    config = DataConfig(source=str(source), cache=str(tmp_path / "cache"))
    assert open_data(config).path != open_data(dataclasses.replace(config, **change)).path
    assert open_data(config).path != open_data(config, 1).path


def a_run(folder):
    for name in ("config.toml", "metrics.jsonl", "dataset.json"):
        (folder / name).write_text("{}")


def a_run_that_was_killed_early(folder):
    (folder / "checkpoints").mkdir()
    (folder / "dataset.json").write_text("{}")


def a_dataset(folder):
    folder.rmdir()
    (folder.parents[3] / "other.txt").write_text(TEXT * 40)
    prepare(str(folder.parents[3] / "other.txt"), folder, "byte")


def a_model(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"{}")


def a_cache(folder):
    (folder / CACHE_TAG).write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    (folder / "download.txt").write_text("x")


MADE = {
    a_run: "run folder",
    a_run_that_was_killed_early: "run folder",
    a_dataset: "prepared dataset",
    a_model: "model folder",
    a_cache: "cache folder",
}


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("pattern", ["", "/**/*"])
def test_folders_that_programs_make_are_no_training_text(source, make, pattern):
    identity, texts = open_source(f"{source}{pattern}").identity(), [f"{name} {TEXT}" * 40 for name in "abc"]
    place = source / "deep" / "er"
    place.mkdir(parents=True)
    (place / "made").mkdir()
    make(place / "made")
    after = open_source(f"{source}{pattern}")
    assert after.identity() == identity
    assert [document.text for document in after.documents()] == texts
    assert after.findings.facts()["left_out"] == {MADE[make]: {"count": 1, "names": ["deep/er/made"]}}
    with pytest.raises(UserError, match=f"is a {MADE[make]}, not text"):
        open_source(str(place / "made"))


def test_the_default_cache_is_recognised_without_a_tag(source, monkeypatch):
    monkeypatch.setenv("BARDLING_CACHE", str(source / "cache"))
    identity = open_source(str(source)).identity()
    (source / "cache" / "downloads").mkdir(parents=True)
    (source / "cache" / "downloads" / "x.txt").write_text("downloaded")
    assert open_source(str(source)).identity() == identity


def test_a_folder_that_exists_is_not_marked_as_a_cache(source):
    open_data(DataConfig(source=str(source / "a.txt"), cache=str(source)))
    assert made_folder(source) == ""
    open_data(DataConfig(source=str(source / "a.txt"), cache=str(source / "new")))
    assert made_folder(source / "new") == "cache folder"
    files, left = files_below(source)
    assert [path.name for path in files] == ["a.txt", "b.txt", "c.txt"]
    assert {entry.reason for entry in left} == {"prepared dataset", "cache folder"}


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-000030" / "model.safetensors").read_bytes()


def forget_last_steps(run: Path) -> bytes:
    """Make a run one that was killed after step 20; returns its weights at the end."""
    found = weights(run)
    shutil.rmtree(run / "checkpoints" / "step-000030")
    return found


def test_a_run_and_its_cache_inside_the_source_folder_resume(tmp_path, source, tiny, change):
    config = change(tiny, data={"source": str(source), "tokenizer": "byte", "cache": str(source / "cache")})
    run = source / "runs" / "first"
    train(config, run)
    before = forget_last_steps(run)
    (source / "log.txt").write_text("written meanwhile")
    resume(run)
    assert weights(run) == before
    assert open_data(config.data).fingerprint != json.loads((run / "dataset.json").read_text())["fingerprint"]


@pytest.mark.parametrize("change_of_text", ["more text", "text gone", "cache moved"])
def test_a_resumed_run_finds_its_recorded_dataset(tmp_path, source, tiny, change, change_of_text):
    config = change(tiny, data={"source": str(source), "tokenizer": "byte", "cache": str(tmp_path / "cache")})
    train(config, tmp_path / "run")
    before = forget_last_steps(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert record["split_rule"] == 2
    del record["split_rule"]
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(record))  # as earlier versions wrote it
    if change_of_text == "more text":
        (source / "d.txt").write_text("more")
    elif change_of_text == "text gone":
        shutil.rmtree(source)
    else:  # the same dataset at the key of another version
        old = Path(record["path"])
        record["path"] = str(old.rename(old.with_name("byte-of-an-earlier-version")))
        (tmp_path / "run" / "dataset.json").write_text(json.dumps(record))
        os.utime(source / "a.txt", ns=(1, 1))
    resume(tmp_path / "run")
    assert weights(tmp_path / "run") == before
