"""Standard streams that are closed, full, broken, or of an encoding that lacks characters: no traceback, no lost work."""

import errno
import io
import os
import pty
import shlex
import subprocess
import sys

import pytest

from bardling.config.recipes import config_to_toml
from bardling.errors import UserError
from bardling.files.streams import Lasting, tell
from bardling.monitor import progress
from bardling.monitor.console import Console
from bardling.training import loop
from bardling.training.run import train

COMMANDS = ("--help", "--version", "train --help", "info RECIPE", "migrate --help")


@pytest.fixture
def shell(tmp_path, tiny):
    """`shell(command, redirections)`: exit status and both outputs of `bardling COMMAND` in bash."""
    (tmp_path / "tiny.toml").write_text(config_to_toml(tiny))

    def run(command: str, redirections: str, **environment: str) -> tuple[int, str, str]:
        line = f"{shlex.quote(sys.executable)} -m bardling {command} {redirections}".replace("RECIPE", "tiny.toml")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert "internal error" not in done.stdout + done.stderr, done.stderr
        assert "Exception ignored" not in done.stdout + done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_streams_are_no_error(shell, command):
    assert shell(command, ">&- 2>&- <&-") == (0, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "info RECIPE"])
def test_a_full_device_is_reported_and_a_reader_that_exits_is_not(shell, command, unbuffered):
    status, _, said = shell(command, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (status, said) == (2, "bardling: standard output: the disk is full: free some space\n")
    status, _, said = shell(command, "| exec true", PYTHONUNBUFFERED=unbuffered)
    assert (status, said) in ((1, ""), (0, ""))  # 0: everything was written before the reader exited


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "2> >(exec true)"])
def test_an_error_that_cannot_be_printed_keeps_its_status(shell, redirection):
    assert shell("plan nonsense.toml", redirection) == (2, "", "")


def test_a_training_run_without_streams_finishes_and_its_files_do_not_receive_output(shell, tmp_path):
    assert shell("train RECIPE --out run", ">&- 2>&- <&-") == (0, "", "")
    calm = shell("resume run", "> /dev/full")
    assert calm[0] == 0
    assert "the terminal display failed; training continues" in calm[2]
    assert (tmp_path / "run" / "checkpoints" / "step-000030").is_dir()
    assert shell("info run --verify", "")[0] == 0


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"\xb1 \u2013"), ("cp1252", "± –"), ("latin-1", r"± \u2013")])
def test_characters_that_the_encoding_lacks_are_escaped(encoding, shown):
    code = (
        "from bardling.files.streams import open_standard_streams; open_standard_streams()\n"
        "from bardling.cli.tables import print_rows\n"
        r"print_rows([('accuracy', '\xb1 \u2013')])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.decode(encoding).split() == ["accuracy", *shown.split()]


@pytest.mark.parametrize("argument", [b"caf\xe9.toml", b"--prompt=\xff", b"\xed\xa0\x80"])
def test_an_argument_with_invalid_bytes_is_named(argument, tmp_path):
    command = [sys.executable, "-m", "bardling", "train", argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 2
    assert ascii(os.fsdecode(argument)) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_standard_input_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    from bardling.files.prompt import read_prompt_input

    with (tmp_path / "out").open("w") as unreadable:
        monkeypatch.setattr(sys, "stdin", os.fdopen(unreadable.fileno(), "r", closefd=False))
        with pytest.raises(UserError, match="standard input: cannot read: bad file descriptor"):
            read_prompt_input()


class Failing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_display_that_fails_stops_and_remembers_why(number, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(10, 0, stream=Failing(number))
    console.log({"kind": "train", "step": 1, "loss": 1.0})
    console.note("a note")
    console.close()
    assert isinstance(console.failure, OSError)
    assert console.failure.errno == number


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_warning_that_cannot_be_printed_ends_nothing(monkeypatch, number):
    for stream in (Failing(number), None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell("warning: the disk is full")


def test_warnings_do_not_control_the_terminal(capsys):
    tell("warning: \x1b[2Jgone")
    assert capsys.readouterr().err == "bardling: warning: \\x1b[2Jgone\n"


def test_progress_in_a_log_has_units(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", -1.0)
    with progress.ProgressBar(unit="bytes") as bar:
        bar.note = "1,200 documents/s"
        bar.update("tokenizing", 25_000_000, 100_000_000)
    assert capsys.readouterr().err.startswith("tokenizing: 25.0 MB of 100 MB, 1,200 documents/s, ")


def test_a_named_stream_raises_its_failure_once():
    stream = Lasting(Failing(errno.EIO), "standard output")
    with pytest.raises(OSError, match="standard output"):
        stream.write("x")
    stream.write("y")
    stream.flush()


def test_training_continues_when_its_terminal_is_closed(tiny, tmp_path, monkeypatch):
    """With SIGHUP ignored, as `nohup` and `disown` have it, a closed terminal is only an output that fails with EIO."""
    parent, child = pty.openpty()
    seed = loop.seed_dropout

    def close_terminal(*arguments: int) -> None:
        if arguments[1] == 5:
            os.close(parent)
        seed(*arguments)

    said, terminal = io.StringIO(), os.fdopen(child, "w")
    with monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(loop, "seed_dropout", close_terminal)
        patch.setattr(sys, "stderr", said)
        patch.setattr(sys, "stdout", terminal)
        train(tiny, tmp_path / "run")
    with pytest.raises(OSError, match="Input/output error"):
        terminal.close()
    assert said.getvalue().count("the terminal display failed; training continues") == 1
