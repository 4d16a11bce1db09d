"""`bardling data show`, `data tokenizer` and the page about a run's data, and the commands of docs/data.md about them."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bardling.cli.main import main
from bardling.data.batches import IGNORE
from bardling.data.batches.loader import TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.packing import document_start
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.training.run import train

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SECTIONS = PAGE.read_text().split("\n## Checking\n")[1].split("\n## Long text")[0]
COMMANDS = re.findall(r"^bardling (data [^#\n]*)", SECTIONS, re.MULTILINE)


def output(capsys, *argv):
    main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder of text, one with each kind of thing that has to be escaped."""
    folder = tmp_path_factory.mktemp("notes") / "notes"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"note {number}: " + f"word{number} " * 20 + "\n")
    (folder / "30.txt").write_text("bell \x07 and \x1b[31mred" + " x" * 40)
    return folder


@pytest.fixture(scope="module")
def dataset(notes, tmp_path_factory):
    return prepare(str(notes), tmp_path_factory.mktemp("data") / "set", "byte")


def sequences(text):
    """What is printed for each sample, as (text, bracketed text)."""
    parts = text.split("\nsample ")[1:]
    bodies = [part.split("\n", 1)[1] for part in parts]
    bodies = [re.sub(r"\n(=== .* ===|--- .* ---)\n", "", body) for body in bodies]
    return [(re.sub(r"\[\[|\]\]", "", body).strip("\n"), re.findall(r"\[\[(.*?)\]\]", body, re.DOTALL)) for body in bodies]


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_shown_is_what_the_loader_gives(dataset, masked, capsys):
    shown = output(
        capsys,
        "data",
        "show",
        dataset.path,
        "--block_size",
        300,
        "--step",
        2,
        "--batch_size",
        4,
        "--count",
        4,
        "--document_mask",
        masked,
    )
    split = dataset.split("train")
    order = SequenceOrder(1337, len(split), 300)
    batch = TrainSequences(split, order, document_start(masked, dataset, dataset.tokenizer)).batch(4, 4)
    found = sequences(shown)
    assert len(found) == 4
    for row, (text, bracketed) in enumerate(found):
        ids = [*batch.inputs[row].tolist(), int(batch.targets[row, -1])]
        expected = dataset.tokenizer.decode(ids).replace("\x07", "\\x07").replace("\x1b", "\\x1b")
        assert text.replace("\n", "") == expected.replace("\n", "")
        assert bracketed == [expected[0]]  # the first token is no target
    assert "\x1b" not in shown
    begun = 0 if batch.documents is None else len(set(batch.documents.tolist()) - {row * 300 for row in range(5)})
    assert shown.count("--- attention begins anew ---") == begun
    assert (begun > 0) == masked
    assert re.search(r"=== '\d\d\.txt' \(document \d+, tokens [\d,]+ to [\d,]+\) begins ===", shown)


def test_a_run_shows_the_samples_of_a_step(tiny, notes, tmp_path, capsys):
    data = replace(tiny.data, source=str(notes), tokenizer="byte")
    run = train(replace(tiny, data=data), tmp_path / "run", quiet=True)
    del run
    shown = output(capsys, "data", "show", tmp_path / "run", "--step", 2, "--count", 99)
    listed = output(capsys, "info", tmp_path / "run", "--step", 2)
    samples = re.findall(r"^sample ([\d,]+): tokens ([\d,]+) to", listed, re.MULTILINE)
    assert re.findall(r"^sample ([\d,]+): tokens ([\d,]+) to", shown, re.MULTILINE) == samples
    assert len(samples) == tiny.train.batch_size
    page = tmp_path / "page.html"
    assert output(capsys, "report", tmp_path / "run", "--data", page).endswith(f"{page}\n")
    text = page.read_text()
    assert "<h2>Random sequences</h2>" in text
    assert "Length of documents" in text
    assert "<script" not in text
    checked = output(capsys, "data", "check", tmp_path / "run")
    assert "training" in checked
    assert "tokens" in checked


def test_answers_of_conversations_are_shown_as_learned(tmp_path, tiny, capsys):
    rows = [[("user", f"What is {n}?"), ("assistant", f"It is {n}.")] for n in range(30)]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    data = replace(tiny.data, source=str(tmp_path / "chat.jsonl"), tokenizer="byte", chat_template="chatml")
    model = replace(tiny.model, block_size=128)
    train(replace(tiny, data=data, model=model), tmp_path / "run", quiet=True)
    shown = output(capsys, "data", "show", tmp_path / "run", "--count", 1)
    learned = re.sub(r"\[\[.*?\]\]", "", sequences_with_brackets(shown), flags=re.DOTALL)
    assert re.search(r"It is \d+\.", learned)
    assert "What is" not in learned
    assert "attention within each document only" in shown


def sequences_with_brackets(text):
    return re.sub(r"\n(=== .* ===|--- .* ---)\n", "", text.split("\nsample ")[1].split("\n", 1)[1])


def test_text_is_not_shown_before_it_is_prepared(notes, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "show", str(notes)])
    assert stop.value.code == 2
    assert f"bardling prepare {notes} --out DATASET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek", "x"], "did you mean 'check'"),
        (["check", "nothing-here"], "no such file or folder"),
        (["check", ".", "--tokenizer", "bpe:x"], "SIZE must be a number"),
        (["check", ".", "--page", "no/such/folder/p.html"], "the folder no/such/folder does not exist"),
        (["tokenizer", ".", "--tokenizer", "byte", "--sample", "lots"], "must be a size such as 200MB"),
        (["show", ".", "--step", "0"], "--step 0: must be at least 1"),
    ],
)
def test_user_errors(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["data", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_is_trained_on_the_training_text_alone_and_measured(notes, tmp_path, capsys):
    shown = output(
        capsys, "data", "tokenizer", notes, "--tokenizer", "bpe:300", "--out", tmp_path / "t.json", "--compare", "byte"
    )
    trained = load_tokenizer(tmp_path / "t.json")
    dataset = prepare(str(notes), tmp_path / "set", "bpe:300")
    assert trained.fingerprint == dataset.tokenizer.fingerprint
    texts = [path.read_text() for path in notes.iterdir()]
    ids = [trained.encode(text) for text in texts]
    ratio = float(re.search(r"bytes per token +([\d.]+)", shown)[1])
    assert ratio == pytest.approx(sum(map(len, texts)) / sum(map(len, ids)), rel=0.1)
    assert "1.000 with byte on the same text" in shown
    assert re.search(r"number 365 +3 \| 6 \| 5", shown)
    assert np.all(np.concatenate(ids) != IGNORE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command, notes, tiny, tmp_path_factory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").symlink_to(notes)
    (tmp_path / "items.jsonl").write_text(json.dumps({"ctx": "note " * 14, "endings": ["a b", "c d"], "label": 0}))
    if "runs/first" in command:
        train(replace(tiny, data=replace(tiny.data, source=str(notes), tokenizer="byte")), tmp_path / "runs/first", quiet=True)
        command = command.replace("--step 100", "--step 2")
    if "data/code" in command:
        prepare(str(notes), tmp_path / "data/code", "byte")
    if "--tokenizer tokenizer.json" in command:
        main(shlex.split(COMMANDS[-2]))
    main(shlex.split(command))
    assert capsys.readouterr().out


def test_the_page_has_commands():
    assert len(COMMANDS) == 7
