"""`bardling chat`: piped and on a pseudo-terminal, with models that answer what a test has written for them."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bardling.cli.chat import _Interrupts
from bardling.cli.main import main
from bardling.errors import Terminated
from chat_models import write_scripted_model

ANSWER = "A\x1b[31m\tB\r"  # colours the terminal, if it arrives there
SHOWN = "A\\x1b[31m\tB\\r"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "chat", "\n" + ANSWER)
    write_scripted_model(folder / "small", "\n" + ANSWER, block_size=96)
    write_scripted_model(folder / "endless", "\nabc", endless=True, block_size=20_000)
    write_scripted_model(folder / "base", ": yes", chat=False)
    return folder


@pytest.fixture
def chat(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """`chat("model", "lines", *options)`: both outputs of a chat whose turns come from a pipe."""
    monkeypatch.chdir(tmp_path)

    def run(model: str, lines: str | bytes, *options: str, status: int = 0) -> tuple[str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        cold = [] if any(option.startswith("--temperature") for option in options) else ["--temperature", "0"]
        argv = ["chat", str(models / model), *cold, "--device", "cpu", "--seed", "1", *options]
        if status:
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert stop.value.code == status
        else:
            main(argv)
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def saved(name: str = "out.json") -> Any:
    return json.loads(Path(name).read_text())


# ---- from a pipe ----


def test_each_line_is_a_turn_and_only_answers_are_printed(chat: Any) -> None:
    assert chat("chat", "one\n\n  \r\ntwo\r\n/save out.json\n") == (f"{SHOWN}\n" * 2, "")
    messages = [("user", "one"), ("assistant", ANSWER), ("user", "two"), ("assistant", ANSWER)]
    assert saved() == {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_commands_work_from_a_pipe_and_say_nothing(chat: Any) -> None:
    lines = "/system  Be brief. \none\n/reset\n//two\n/help\n/save out.json\n/quit\nthree\n"
    assert chat("chat", lines) == (f"{SHOWN}\n" * 2, "")
    assert [(m["role"], m["content"]) for m in saved()["messages"]] == [
        ("system", "Be brief."),
        ("user", "/two"),
        ("assistant", ANSWER),
    ]
    chat("chat", "/system\none\n/save no-system.json\n", "--system", "Be brief.")
    assert saved("no-system.json")["messages"][0]["role"] == "user"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_weights_of_fewer_bits_give_the_same_clear_answer(chat: Any, weights: str) -> None:
    assert chat("chat", "one\n", "--weights", weights) == (f"{SHOWN}\n", "")


def test_a_random_seed_is_printed(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    main(["chat", str(models / "chat"), "--max_new_tokens", "3"])
    printed = capsys.readouterr()
    assert re.fullmatch(r"bardling: --seed \d+\nbardling: the answer was cut at --max_new_tokens\n", printed.err)


def test_a_base_model_continues_the_text(chat: Any) -> None:
    said = "has no chat template: it continues the text that you type\n"
    out, err = chat("base", "Really:\nSure:\n/save out.json\n")
    assert out == " yes\n yes\n"
    assert err.startswith("bardling: ")
    assert err.endswith(f"models0/base {said}")
    assert saved() == {"text": "Really: yes\nSure: yes\n"}
    assert "has no chat template, and so no system message: leave it out" in chat("base", "", "--system", "x", status=2)[1]
    assert "/system: the model has no chat template" in chat("base", "/system x\n", status=2)[1]


def test_a_full_context_is_said(chat: Any) -> None:
    _, err = chat("small", "one\ntwo\n")
    assert err == "bardling: the conversation exceeds the model's context: it no longer sees the oldest turn\n"
    _, err = chat("endless", "a\nb\n", "--max_new_tokens", "6")
    assert err == "bardling: the answer was cut at --max_new_tokens\n" * 2
    out, err = chat("small", "one\n" + "x" * 50 + "\n", status=2)
    assert out == f"{SHOWN}\n"
    assert re.fullmatch(
        r"bardling: the prompt has \d+ tokens without earlier turns; .* of 96 tokens .*: shorten the text\n", err
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            "hi\n/rest\n",
            "unknown command /rest (did you mean '/reset'?); /help lists all; a turn that begins with / is written",
        ),
        ("hi\n/save\n", "/save: name a file, as in /save chat.json"),
        ("hi\n/save taken.json\n", "taken.json: exists already: choose another name"),
        ("hi\n/save no/such/folder.json\n", "cannot write: no such file or directory"),
        (b"hi\ncaf\xe9\n", "standard input, line 2: is not UTF-8 text"),
        (b"hi\n" + b"x" * (16 << 20) + b"x\n", "standard input, line 2: is longer than 16 MiB: give a shorter text"),
    ],
    ids=range(6),
)
def test_from_a_pipe_the_first_error_ends_the_chat(chat: Any, lines: str | bytes, says: str) -> None:
    Path("taken.json").write_text("mine")
    after = "after\n" if isinstance(lines, str) else b"after\n"
    out, err = chat("chat", lines + after, status=2)  # type: ignore[operator]
    assert out == f"{SHOWN}\n"
    assert says in err
    assert err.count("\n") == 1
    assert Path("taken.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "-1"),
        ("top_p", "2"),
        ("min_p", "1.5"),
        ("repetition_penalty", "0"),
        ("max_new_tokens", "0"),
        ("top_k", "0"),
    ],
)
def test_settings_without_a_meaning_are_refused(chat: Any, option: str, value: str) -> None:
    out, err = chat("chat", "hi\n", f"--{option}={value}", status=2)
    assert out == ""
    assert option in err
    assert value in err


def test_a_faulty_template_is_named(chat: Any, models: Path, tmp_path: Path) -> None:
    folder = write_scripted_model(tmp_path / "faulty", "\nA")
    (folder / "chat_template.jinja").write_text("\n{{ ''.__class__.x }}")
    _, err = chat(str(folder), "hi\n", status=2)
    assert err.startswith(f"bardling: {folder}/chat_template.jinja: line 2: SecurityError: ")


# ---- on a terminal ----


class Terminal:
    """`bardling chat` on a pseudo-terminal."""

    def __init__(self, model: Path, *options: str) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "INPUTRC": "/dev/null"}
            argv = [sys.executable, "-m", "bardling", "chat", str(model), "--temperature", "0", "--device", "cpu", *options]
            os.execv(sys.executable, argv)
        self._text = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def until(self, pattern: str) -> str:
        """What appears up to a pattern."""
        while not (found := re.search(pattern, self._text)):
            assert select.select([self._file], [], [], 60)[0], f"{pattern!r} does not appear after {self._text!r}"
            self._text += os.read(self._file, 65536).decode()
        seen, self._text = self._text[: found.end()], self._text[found.end() :]
        return seen

    def status(self) -> int:
        """The exit status, once the program has ended."""
        while True:
            try:
                if not (data := os.read(self._file, 65536)):
                    break
                self._text += data.decode()
            except OSError:  # how a pseudo-terminal ends
                break
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_on_a_terminal_which_ctrl_c_leaves(models: Path, tmp_path: Path) -> None:
    terminal = Terminal(models / "chat", "--seed", "1")
    assert "/help lists the commands, Ctrl-D leaves" in terminal.until("> ")
    terminal.type("hello\r")
    assert "\x1b[31m" not in terminal.until(re.escape(SHOWN))
    terminal.until("> ")
    terminal.type("\x1b[A\r")  # the line before, from the history
    assert "hello" in terminal.until(re.escape(SHOWN))
    terminal.type("/nonsense\r")
    terminal.until("bardling: unknown command /nonsense")  # and goes on
    terminal.type("/help\r")
    shown = terminal.until("Ctrl-C during an answer")
    assert all(name in shown for name in ("/reset", "/system TEXT", "/save FILE", "/help", "/quit"))
    terminal.type("/system Be kind.\r")
    terminal.until("the system message is now 'Be kind.'")
    terminal.type(f"/save {tmp_path}/out.json\r")
    terminal.until("saved to ")
    terminal.type("/reset\r")
    terminal.until("the conversation is forgotten")
    terminal.type("\x03")
    assert terminal.status() == 0
    assert len(saved(f"{tmp_path}/out.json")["messages"]) == 5


def test_ctrl_c_ends_only_the_answer_and_other_signals_the_command(models: Path, tmp_path: Path) -> None:
    terminal = Terminal(models / "endless", "--max_new_tokens", "15000")
    terminal.until("> ")
    for text in ("one", "two"):
        terminal.type(f"{text}\r")
        terminal.until("abcabcabc")
        terminal.type("\x03")
        terminal.until("\n> ")
    terminal.type(f"/save {tmp_path}/out.json\r")
    terminal.until("saved to ")
    messages = saved(f"{tmp_path}/out.json")["messages"]
    assert [message["content"] for message in messages[::2]] == ["one", "two"]
    assert all(5 < len(message["content"]) < 15000 for message in messages[1::2])
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.status() == 143


def test_the_prompt_stays_out_of_a_file_that_collects_the_answers(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"hi\n\x04")  # Ctrl-D
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        main(["chat", str(models / "chat"), "--temperature", "0", "--seed", "1", "--device", "cpu"])
    os.close(ours)
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN}\n\n"
    assert printed.err == "bardling: /help lists the commands, Ctrl-D leaves\n> > "


def test_a_second_ctrl_c_during_an_answer_ends_the_command() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts = _Interrupts()
    with interrupts:
        with interrupts.during_answer():
            signal.raise_signal(signal.SIGINT)
            assert interrupts.requested
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGINT)
        with interrupts.during_answer():
            assert not interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
