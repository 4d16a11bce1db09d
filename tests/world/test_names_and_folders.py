"""A folder or file in the working directory that has a built-in name: the name wins, a note says so, and `./NAME` is a path."""

import dataclasses
import json
import sysconfig

import pytest

from bardling.checkpoint import load as loading
from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.config import DataConfig, ModelConfig, RunConfig
from bardling.data.text.named_datasets import is_source_name, source_for
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import build_tokenizer, check_tokenizer_spec, is_tokenizer_path
from bardling.interop.pretrained import is_hub_name
from bardling.training.resolve_data import absolute_paths
from bardling.training.run import resume, train

DATASETS = ("stdlib", "shakespeare", "shakespeare-char", "openwebtext", "fineweb-edu")
TOKENIZERS = ("byte", "char", "gpt2")
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(here, name, kind):
    if kind == "file":
        (here / name).write_text("a text of one's own\n")
    else:
        (here / name).mkdir()
        (here / name / "text.txt").write_text("a text of one's own\n")


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", [*DATASETS, "hf:roneneldan/TinyStories"])
def test_a_dataset_name_stays_a_name(here, name, kind):
    put(here, name.partition(":")[0], kind)
    assert is_source_name(name)
    assert not is_source_name(f"./{name}")
    assert absolute_paths(RunConfig(data=DataConfig(source=name))).data.source == name
    source = source_for(name)
    assert not str(getattr(source, "root", "")).startswith(str(here))


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_folder_is_meant_by_its_path(here, name):
    put(here, name, "folder")
    for spec in (f"./{name}", f"{name}/", str(here / name)):
        (document,) = source_for(spec).documents()
        assert document.text == "a text of one's own\n"
        assert absolute_paths(RunConfig(data=DataConfig(source=spec))).data.source.rstrip("/") == str(here / name)


@pytest.mark.parametrize("name", ["stdlib", "shakespeare-char"])
def test_a_prepared_folder_does_not_replace_a_name(here, name):
    (here / "text.txt").write_text("words\n" * 200)
    prepare("text.txt", here / name, "byte")
    with pytest.raises(Exception, match="stop"):  # the name's own source is opened
        open_with_stop(name)
    assert open_data(DataConfig(source=f"./{name}")).path.name == name


def open_with_stop(name):
    from bardling.data.tokens import dataset

    class StopError(Exception): ...

    def stop(spec):
        raise StopError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "source_for", stop)
        open_data(DataConfig(source=name))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tokenizer_name_stays_a_name(here, name, kind):
    put(here, name, kind)
    check_tokenizer_spec(name)
    assert not is_tokenizer_path(name)
    assert is_tokenizer_path(f"./{name}")
    assert absolute_paths(RunConfig(data=DataConfig(tokenizer=name))).data.tokenizer == name
    assert absolute_paths(RunConfig(data=DataConfig(tokenizer=f"./{name}"))).data.tokenizer == str(here / name)


def test_a_size_of_bpe_stays_a_size(here):
    put(here, "bpe", "folder")
    put(here, "bpe:300", "file")
    assert check_tokenizer_spec("bpe:300") == 300
    assert absolute_paths(RunConfig(data=DataConfig(tokenizer="bpe:300"))).data.tokenizer == "bpe:300"


def test_text_is_encoded_by_the_named_tokenizer_and_not_by_the_folder(here):
    (here / "byte").mkdir()
    build_tokenizer("char", ["abc"]).save(here / "byte")
    (here / "text.txt").write_text("abcabcabc" * 20)
    assert open_data(DataConfig(source="text.txt", tokenizer="byte")).tokenizer.kind == "byte"
    assert open_data(DataConfig(source="text.txt", tokenizer="./byte")).tokenizer.kind == "char"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_model_name_stays_a_name(here, name, kind, monkeypatch):
    class FetchedError(Exception): ...

    def fetch(spec):
        raise FetchedError(spec)

    put(here, name, kind)
    (here / "config.toml").write_text("")  # not the run that the model belongs to either
    monkeypatch.setattr(loading, "fetch_model", fetch)
    assert is_hub_name(name)
    assert not is_hub_name(f"./{name}")
    assert loading.run_of(name) is None
    assert absolute_paths(RunConfig(model=ModelConfig(init=name))).model.init == name
    assert absolute_paths(RunConfig(model=ModelConfig(init=f"./{name}"))).model.init == str(here / name)
    with pytest.raises(FetchedError, match=name):
        loading.load(name)


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [
        ("--data.source", "stdlib", "dataset"),
        ("--data.tokenizer", "byte", "tokenizer"),
        ("--data.tokenizer", "char", "tokenizer"),
    ],
)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_note_tells_which_is_used(here, option, name, kind, what, capsys):
    put(here, name, what)
    main(["plan", "quickstart", option, name])
    notes = [line for line in capsys.readouterr().err.splitlines() if "built-in" in line]
    assert notes == [
        f"bardling: {name!r} is the built-in {kind}, not the {what} of this name: write ./{name} to use the {what}"
    ]


def test_without_such_a_folder_there_is_no_note(here, capsys):
    main(["plan", "quickstart", "--data.source", "stdlib"])
    assert "built-in" not in capsys.readouterr().err


@pytest.fixture
def small_stdlib(tmp_path_factory, monkeypatch):
    """A standard library of one file, so that preparing it takes no time."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "module.py").write_text("import this\n" * 400)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))


@pytest.mark.parametrize("spec", ["stdlib", "./stdlib"])
def test_a_resumed_run_keeps_its_dataset(here, tiny, change, small_stdlib, spec, monkeypatch):
    if spec == "./stdlib":
        (here / "stdlib").mkdir()
        (here / "stdlib" / "mine.txt").write_text("import that\n" * 400)
    config = change(tiny, data={"source": spec}, optim={"warmup_steps": 1}, train={"steps": 4})
    train(config, here / "run", quiet=True)
    recorded = json.loads((here / "run" / "dataset.json").read_text())["fingerprint"]
    assert RunFolder(here / "run").config().data.source == ("stdlib" if spec == "stdlib" else str(here / "stdlib"))
    if spec == "stdlib":  # a folder of this name appears
        put(here, "stdlib", "folder")
    else:
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    if spec == "stdlib":
        resume(here / "run", longer, quiet=True)
    else:
        longer = dataclasses.replace(longer, data=RunFolder(here / "run").config().data)
        resume(here / "run", longer, quiet=True)
    assert json.loads((here / "run" / "dataset.json").read_text())["fingerprint"] == recorded
