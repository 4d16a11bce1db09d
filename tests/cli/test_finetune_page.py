"""Every command in docs/finetune.md runs, and its rows are conversations."""

import dataclasses
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from bardling.cli.main import main
from bardling.data.text.conversations import conversation
from bardling.training.run import train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SHORT = ["--train.steps", "6", "--eval.every", "3", "--sample.every", "6", "--sample.max_new_tokens", "4", "--compile", "off"]


def test_every_command_runs(tiny, tmp_path, monkeypatch, capsys):
    data = dataclasses.replace(tiny.data, tokenizer="byte")
    model = dataclasses.replace(tiny.model, block_size=96)
    base = dataclasses.replace(tiny, data=data, model=model, train=dataclasses.replace(tiny.train, steps=4))
    train(base, tmp_path / "runs" / "base", quiet=True)
    monkeypatch.chdir(tmp_path)
    main(["export", "runs/base", "--out", "exported"])
    rows = [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(40)]
    for name in ("chat.jsonl", "other.jsonl"):
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say 3\n")))
    for command in COMMANDS:
        capsys.readouterr()
        words = shlex.split(command)[1:]
        main(words + (SHORT if words[0] == "train" else ["--max_new_tokens", "4"] if words[0] == "chat" else []))
        printed = capsys.readouterr().out
        if words[0] == "train":
            assert "with the tokens and the template of ChatML" in printed
            assert "bardling chat runs/" in printed
    assert "perplexity" in printed
    assert len(COMMANDS) == 8


def test_the_example_makes_conversations(capsys):
    runpy.run_path(str(ROOT / "examples" / "chat" / "questions.py"), run_name="__main__")
    found = [conversation(json.loads(row)) for row in capsys.readouterr().out.splitlines()]
    assert len(found) > 100
    assert any(len(turns) > 2 for turns in found)


def test_the_rows_of_the_page_are_conversations():
    rows = [json.loads(row) for row in re.findall(r"`(\{\"(?:messages|conversations|instruction|prompt)\".*?\})`", PAGE)]
    assert [[message["role"] for message in conversation(row)] for row in rows] == [["user", "assistant"]] * 4


@pytest.mark.parametrize("recipe", ["chat", "finetune"])
def test_text_does_not_change_the_tokenizer(recipe, tiny, tmp_path, monkeypatch, bardling):
    base = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, tokenizer="byte"))
    train(dataclasses.replace(base, train=dataclasses.replace(tiny.train, steps=2)), tmp_path / "base", quiet=True)
    options = ["--model.init", tmp_path / "base", "--data.source", tiny.data.source, "--data.format", "text", *SHORT]
    done = bardling("train", recipe, "--out", tmp_path / "run", *options)
    assert "ChatML" not in done.stdout
