"""Paths as people write them: `~` in options, TOML and task lists, colons, and names that begin with a tilde."""

import dataclasses

import pytest

from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.cli.parse import parse
from bardling.cli.prepare import PrepareOptions
from bardling.cli.resume import ResumeOptions
from bardling.cli.sample import SampleOptions
from bardling.cli.train import TrainOptions
from bardling.config import DataConfig, EvalConfig, ModelConfig, RunConfig, SampleConfig
from bardling.config.recipes import load_recipe, parse_recipe
from bardling.data.text.named_datasets import source_for
from bardling.evaluate.tasks import load_items
from bardling.files.paths import expand_home
from bardling.files.prompt import read_prompt_file
from bardling.monitor.jsonl import read_jsonl
from bardling.training.resolve_data import absolute_paths
from bardling.training.run import resume, train

ITEM = '{"ctx": "The king", "endings": [" met", " rose"], "label": 0}\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", ""),
        ("~/x", "/x"),
        ("~/x y/é.txt", "/x y/é.txt"),
        ("~/a:b.jsonl:field", "/a:b.jsonl:field"),
        ("~/*.txt", "/*.txt"),
    ],
)
def test_a_tilde_is_the_home_folder(home, written, meant):
    expected = f"{home}{meant}"
    assert expand_home(written) == expected
    assert DataConfig(source=written).source == expected
    assert DataConfig(tokenizer=written).tokenizer == expected
    assert DataConfig(cache=written).cache == expected
    assert ModelConfig(init=written).init == expected
    assert EvalConfig(tasks=("hellaswag", written)).tasks == ("hellaswag", expected)


@pytest.mark.parametrize("name", ["x~", "a/~/b", "./~x", "", "-~"])
def test_only_a_leading_tilde_counts(home, name):
    assert expand_home(name) == name


def test_a_file_whose_name_begins_with_a_tilde_is_a_file(home, tmp_path):
    (tmp_path / "here" / "~notes.txt").write_text("mine\n")
    (document,) = source_for(DataConfig(source="~notes.txt").source).documents()
    assert document.text == "mine\n"


def test_a_user_who_does_not_exist_is_no_internal_error(home, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--data.source", "~nobody-of-this-name/x", "--out=~/run"])
    assert stop.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--out=~/run", "--out ~/run"])
def test_an_output_folder_in_the_home_folder(home, form):
    options = parse(TrainOptions, form.split(), prog="x", description="x")
    assert options.out == home / "run"
    assert parse(PrepareOptions, ["~/t.txt", *form.split()], prog="x", description="x").source == f"{home}/t.txt"
    assert parse(ResumeOptions, form.split(), prog="x", description="x").out == home / "run"


def test_a_prompt_is_text_and_its_file_is_a_path(home):
    options = parse(SampleOptions, ["~/run", "--prompt=~/x", "--prompt_file=~/p.txt"], prog="x", description="x")
    assert (options.model, options.prompt, options.prompt_file) == (f"{home}/run", "~/x", home / "p.txt")
    (home / "p.txt").write_text("hello")
    assert read_prompt_file("~/p.txt") == "hello"
    assert SampleConfig(prompt="~/x").prompt == "~/x"


def test_values_of_toml_are_expanded(home):
    text = '[data]\nsource = "~/t.txt"\ntokenizer = "~/tok"\n[model]\ninit = "~/m"\n[eval]\ntasks = ["~/t.jsonl"]\n'
    config = parse_recipe(text, "x")
    found = (config.data.source, config.data.tokenizer, config.model.init, *config.eval.tasks)
    assert found == tuple(f"{home}/{name}" for name in ("t.txt", "tok", "m", "t.jsonl"))
    (home / "mine.toml").write_text(text)
    assert load_recipe("~/mine.toml") == config


def test_a_run_in_the_home_folder_with_tasks_there(home, tiny, change, corpus):
    (home / "text.txt").write_bytes(corpus.read_bytes())
    (home / "task.jsonl").write_text(ITEM)
    assert load_items(EvalConfig(tasks=("~/task.jsonl",)).tasks[0])
    config = change(
        tiny, data={"source": "~/text.txt"}, eval={"tasks": ("~/task.jsonl",)}, optim={"warmup_steps": 1}, train={"steps": 6}
    )
    train(config, "~/run", quiet=True)
    assert RunFolder(home / "run").config().data.source == str(home / "text.txt")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    assert resume("~/run", longer, quiet=True).step == 8


def test_a_task_file_is_found_when_the_run_resumes_elsewhere(home, tiny, change, tmp_path, monkeypatch, capsys):
    (tmp_path / "here" / "task.jsonl").write_text(ITEM)
    train(
        change(tiny, eval={"tasks": ("task.jsonl",)}, optim={"warmup_steps": 1}, train={"steps": 6}), home / "run", quiet=True
    )
    config = RunFolder(home / "run").config()
    assert config.eval.tasks == (str(tmp_path / "here" / "task.jsonl"),)
    monkeypatch.chdir(tmp_path)
    resume(home / "run", change(config, train={"steps": 8}), quiet=True)
    records = read_jsonl(home / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "task"] == [6, 8]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["12:30.txt", "a:text", "x:y:z", "c:", "dir:with:colons/t.txt"])
def test_a_colon_in_a_path(home, tmp_path, name):
    path = tmp_path / "here" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text with a colon in its name\n")
    for spec in (name, f"./{name}", str(path)):
        (document,) = source_for(spec).documents()
        assert document.text == "text with a colon in its name\n"
        assert absolute_paths(RunConfig(data=DataConfig(source=spec))).data.source == str(path)


def test_a_colon_before_the_field(home, tmp_path):
    path = tmp_path / "here" / "10:00.jsonl"
    path.write_text('{"body": "one", "text": "two"}\n')
    assert [document.text for document in source_for("10:00.jsonl").documents()] == ["two"]
    assert [document.text for document in source_for("10:00.jsonl:body").documents()] == ["one"]
    assert absolute_paths(RunConfig(data=DataConfig(source="10:00.jsonl:body"))).data.source == f"{path}:body"


def test_an_existing_path_wins_over_a_field(home, tmp_path):
    (tmp_path / "here" / "rows.jsonl").write_text('{"body": "a row"}\n')
    (tmp_path / "here" / "rows.jsonl:body").write_text("a file")
    (document,) = source_for("rows.jsonl:body").documents()
    assert document.text == "a file"
