"""Every command and every piece of Python in docs/generate.md runs as it is written there."""

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bardling.cli import chat
from bardling.cli.main import main
from bardling.training.run import train
from chat_models import write_scripted_model

PAGE = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines() if "bardling " in line]
TURNS = "Hello\nAre you there?\n"


@pytest.fixture
def place(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a chat model and the files that the page names."""
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, tokenizer="byte"))
    train(dataclasses.replace(config, train=dataclasses.replace(tiny.train, steps=8)), tmp_path / "runs" / "first", quiet=True)
    write_scripted_model(tmp_path / "models" / "assistant", "\nYes.")
    (tmp_path / "notes.txt").write_text("The king and the queen met")
    (tmp_path / "questions.txt").write_text(TURNS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(command: str) -> list[str]:
    """The words that a shell makes of a command."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a line of the page; what it prints, or writes to a file."""
    before, _, command = line.rpartition("| ")
    command, _, output = command.partition(" > ")
    command, _, source = command.partition(" < ")
    data = subprocess.run(["bash", "-c", before], capture_output=True, check=True).stdout if before else b""
    data = Path(source).read_bytes() if source else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    main(words_of(command)[1:])
    printed = capsys.readouterr().out
    if output:
        Path(words_of(output)[0]).write_text(printed)
    return printed


def test_every_command_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {line.split("#")[0].strip(): run(line.split("   #")[0], monkeypatch, capsys) for line in COMMANDS}
    assert len(printed) == 11
    samples = {command: text for command, text in printed.items() if "sample" in command}
    assert all(text for text in samples.values())
    assert sum("--- sample 3 of 3 ---" in text for text in samples.values()) == 1
    assert (place / "completion.txt").read_text().startswith("import os\n")
    assert (place / "answers.txt").read_text() == "Yes.\n" * len(TURNS.splitlines())


def test_the_table_is_as_the_command_prints_it(place: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [line for line in COMMANDS if "--logprobs" in line]
    shown = next(block for kind, block in BLOCKS if block.startswith("token")).splitlines()
    lines = run(command, monkeypatch, capsys).splitlines()
    start = max(
        place for place, line in enumerate(lines) if line.split() == shown[0].split()
    )  # after the text, which is random
    rule, *rows = lines[start + 1 :]
    assert set(rule) == set(shown[1])
    assert 1 <= len(rows) <= len(shown[2:]) == 4
    row = r"b?(['\"]).+\1 +[\d.]+% +-?[\d.]+   (b?(['\"]).+?\3 [\d.]+% *){2}"
    assert all(re.fullmatch(row, line) for line in [*rows, *shown[2:]])


def test_the_python_code_runs(place: Path) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(code, "docs/generate.md", "exec"), {})


def test_the_commands_of_a_chat_are_those_of_the_page(place: Path) -> None:
    session = chat._Session(None, terminal=False, chat=True)  # type: ignore[arg-type]
    listed = dict(re.findall(r"^\| `(/\w+(?: [A-Z]+)?)` \| (.*?) \|$", PAGE, re.MULTILINE))
    assert [name.split()[0] for name in listed] == list(session._commands)
    assert [name.partition(" ")[2] for name in listed] == [argument for argument, *_ in session._commands.values()]
