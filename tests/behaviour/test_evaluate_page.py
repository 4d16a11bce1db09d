"""Every command of docs/evaluate.md runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bardling.cli.main import main
from bardling.config.recipes import config_from_dict, config_to_toml
from bardling.config.run import RunConfig
from bardling.evaluate import tasks
from bardling.training.run import train

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text()
COMMANDS = re.findall(r"\| `(bardling [^`]*)` \|", PAGE)
ITEMS = [
    {"ctx": f"The {first} and the", "endings": [f"{second} met", "zzzz"], "label": 0}
    for first, second in [("king", "queen"), ("rose", "thorn"), ("night", "day"), ("sea", "storm"), ("love", "war")]
]
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
"""


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A folder with everything that the page's commands name."""
    folder = tmp_path_factory.mktemp("page")
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16},
        "data": {"source": str(corpus), "tokenizer": "byte"},
        "train": {"steps": 4, "batch_size": 2},
        "eval": {"every": 0, "windows": 2},
        "sample": {"every": 0},
        "checkpoint": {"every": 2, "keep_last": 2},
    }
    config = config_from_dict(RunConfig, values, "test")
    train(config, folder / "runs" / "first", quiet=True)
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "second")
    main(["export", str(folder / "runs" / "first"), "--out", str(folder / "exported")])
    (folder / "mine.toml").write_text(config_to_toml(config))
    (folder / "notes.txt").write_text("The king and the queen met 3 times.\n" * 3)
    (folder / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "mine.yaml").write_text(TASK)
    bundle = folder / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    rows = [{"context": item["ctx"], "continuation": item["endings"][0]} for item in ITEMS]
    (bundle / "eval_data" / "met.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmet,0\n")
    (bundle / "core.yaml").write_text(
        "icl_tasks: [{label: met, dataset_uri: met.jsonl, num_fewshot: [1], icl_task_type: language_modeling}]\n"
    )
    return folder


@pytest.fixture
def local(place, monkeypatch):
    """In that folder, and without a network: the hub's HellaSwag is a few local items."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(tasks, "read_hub_items", lambda source: tasks.read_items(place / "questions.jsonl"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")


def run(command):
    program, *argv = shlex.split(command)
    assert program == "bardling"
    if argv[0] == "train":
        shutil.rmtree("runs/mine", ignore_errors=True)
        argv += ["--out", "runs/mine"]
    main(argv)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "lm-eval:piqa" not in command])
def test_commands(local, command, capsys):
    run(command)
    out = capsys.readouterr().out
    assert "nats per token" in out or "perplexity" in out or "core" in out


@pytest.mark.slow  # lm-eval reads thousands of files to list its tasks
def test_tasks_of_lm_eval(local, capsys, monkeypatch):
    import datasets

    piqa = [{"goal": item["ctx"], "sol1": item["endings"][0], "sol2": "zz", "label": 0} for item in ITEMS]
    arc = [
        {"question": item["ctx"], "choices": {"text": item["endings"], "label": ["A", "B"]}, "answerKey": "A"} for item in ITEMS
    ]

    def load(path, **options):
        part = datasets.Dataset.from_list(piqa if "piqa" in path else arc)
        return datasets.DatasetDict(train=part, validation=part, test=part)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (command,) = [command for command in COMMANDS if "lm-eval:piqa" in command]
    run(command)
    out = capsys.readouterr().out
    assert re.search(r"^lm-eval:piqa +\d", out, re.MULTILINE)
    assert re.search(r"^lm-eval:arc_easy +\d", out, re.MULTILINE)
    assert out.count("5 of 5 items") == 2


@pytest.mark.slow
def test_the_command_of_lm_eval(place):
    (command,) = re.findall(r"^python -m (bardling\.evaluate .*)$", PAGE, re.MULTILINE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|mine *\|", done.stdout, re.MULTILINE)
