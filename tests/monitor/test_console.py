"""The display in both forms: plain lines, and a terminal whose control codes are replayed."""

import io
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from bardling.files.streams import escape_unprintable
from bardling.monitor import Sink
from bardling.monitor.console import Console, format_metrics
from bardling.monitor.format import count, duration, percent, si, size_bytes

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 120,
    "loss": 2.34567,
    "bits_per_byte": 1.5349,
    "lr": 6e-4,
    "grad_norm": 1.234,
    "epoch": 0.31,
    "tokens": 999,
    "tokens_per_second": 12345.6,
    "mfu": 0.2314,
    "memory_bytes": 1_400_000_000,
    "seconds_left": 192.0,
    "time": 1e9,
}
VAL: dict[str, Any] = {"kind": "val", "step": 250, "loss": 2.2, "bits_per_byte": 1.5, "perplexity": 9.025, "best": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(0), "0"),
        (count(7), "7"),
        (count(0.5), "0.50"),
        (count(999), "999"),
        (count(999.7), "1.00k"),
        (count(12345), "12.3k"),
        (count(124_337_664), "124M"),
        (count(1_500_000_000), "1.50B"),
        (count(-12345), "-12.3k"),
        (count(float("inf")), "inf"),
        (size_bytes(0), "0 B"),
        (size_bytes(1_400_000_000), "1.40 GB"),
        (size_bytes(123_456), "123 kB"),
        (si(854_438_400, "FLOP"), "854 MFLOP"),
        (size_bytes(float("nan")), "nan B"),
        (duration(0), "0.0s"),
        (duration(0.25), "0.2s"),
        (duration(9.97), "10s"),
        (duration(42), "42s"),
        (duration(59.7), "1m00s"),
        (duration(192), "3m12s"),
        (duration(3599.6), "1h00m"),
        (duration(7384), "2h03m"),
        (duration(200_000), "2d07h"),
        (duration(-5), "-5.0s"),
        (duration(float("inf")), "?"),
        (percent(0.4217), "42.2%"),
    ],
)
def test_numbers_are_short_and_have_units(text: str, expected: str) -> None:
    assert text == expected


def plain(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(1000, 0, stream=stream, **options), stream


def test_plain_lines() -> None:
    console, stream = plain()
    sink: Sink = console
    sink.log(TRAIN)
    sink.log(VAL)
    console.note("a message")
    sink.sample(250, "def", [" f():\n    pass"])
    sink.flush()
    sink.close()
    sink.close()
    assert stream.getvalue() == (
        "step   120/1,000  loss 2.3457  1.5349 bits/byte  lr 6.00e-04  grad norm 1.23  12.3k tok/s  MFU 23.1%  "
        "epoch 0.31  1.40 GB  3m12s left\n"
        "step   250/1,000  validation  loss 2.2000  1.5000 bits/byte  perplexity 9.025  best so far\n"
        "a message\n"
        "--- sample at step 250 ---\ndef f():\n    pass\n---\n"
    )


def test_a_deadline_moves_the_last_step() -> None:
    for stream in (io.StringIO(), Terminal()):
        console = Console(1000, 0, stream=stream, width=80)
        console.set_steps(20)
        console.log(VAL | {"step": 10})
        console.close()
        assert "10/20  validation" in stream.getvalue()


def test_missing_and_unexpected_fields_are_not_an_error() -> None:
    console, stream = plain()
    console.log({})
    console.log({"kind": "train", "step": 3, "loss": float("nan"), "mfu": None, "lr": "high", "grad_norm": True})
    assert stream.getvalue().splitlines()[-1] == "step     3/1,000  loss nan"
    assert format_metrics({"loss": 1, "unknown": 2}) == {"loss": "loss 1.0000"}


def test_generated_text_cannot_control_the_terminal() -> None:
    assert escape_unprintable("a\x1b[2Jb\r\x07\x9bc\n\td\u202e") == "a\\x1b[2Jb\\r\\x07\\x9bc\n\td\\u202e"
    assert escape_unprintable("größe → 日本") == "größe → 日本"
    assert escape_unprintable("größe → 日本", "ascii") == "gr\\xf6\\xdfe \\u2192 \\u65e5\\u672c"
    assert escape_unprintable("\ud800") == "\\ud800"
    for terminal in (False, True):
        stream = Terminal() if terminal else io.StringIO()
        console = Console(10, 0, stream=stream, width=80)
        console.sample(1, "", ["evil \x1b]0;title\x07 [bold]not markup[/bold] :smile:"])
        console.note("\x1b[31m")
        console.close()
        assert "\x1b]0" not in stream.getvalue()
        assert "[bold]not markup[/bold] :smile:" in stream.getvalue()


def test_progress_of_long_work_is_shown_and_of_short_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = plain()
    now = 100.0
    monkeypatch.setattr(console, "_clock", lambda: now)
    for done in range(1, 5):
        console.progress("validating", done, 4)
        now += 0.4
    assert stream.getvalue() == ""
    for done in range(0, 41):
        console.progress("validating", done, 40)
        now += 1.0
    assert stream.getvalue().splitlines() == [
        "validating: 2/40, 38s left",
        "validating: 12/40, 28s left",
        "validating: 22/40, 18s left",
        "validating: 32/40, 8.0s left",
    ]


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def screen(codes: str) -> list[str]:
    """The lines that a terminal shows after these control codes: cursor up, erase line, colours, line breaks."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", codes):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            if part[-1] == "A":
                row -= int(part[2:-1] or 1)
            elif part[-1] == "K":
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_terminal_keeps_metrics_below_and_the_rest_above(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(1000, 100, stream=terminal, width=110)
    console.note("a message")
    console.log(TRAIN | {"step": 110})
    console.log(VAL | {"step": 115})
    now = 0.0
    monkeypatch.setattr(console, "_clock", lambda: now)
    for done in range(3):
        console.progress("validating", done, 4)
        now += 1.5
    assert any(line.startswith("validating") and line.endswith("2/4, 3.0s left") for line in _after_refresh(console, terminal))
    console.progress("validating", 4, 4)
    console.sample(115, "", ["one", "two"])
    console.log(TRAIN)
    console.close()
    lines = [line for line in screen(terminal.getvalue()) if line]
    assert lines[0] == "a message"
    assert lines[1] == "step   115/1,000  validation  loss 2.2000  1.5000 bits/byte  perplexity 9.025  best so far"
    assert lines[2].startswith("sample 1 of 2 at step 115 ─")
    assert (lines[3], lines[5]) == ("one", "two")
    assert lines[-2].startswith("training ━")
    assert lines[-2].endswith(" 120/1,000 steps, 3m12s left")
    assert lines[-1] == (
        "loss 2.3457  1.5349 bits/byte  lr 6.00e-04  grad norm 1.23  12.3k tok/s  MFU 23.1%  epoch 0.31  1.40 GB"
    )
    assert sum("training" in line for line in lines) == 1
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back


def _after_refresh(console: Console, terminal: Terminal) -> list[str]:
    assert console._display is not None
    console._display.refresh()
    return screen(terminal.getvalue())


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(1000, 0, stream=terminal)
    console.log(TRAIN)
    console.close()
    assert terminal.getvalue().startswith("step   120/1,000  loss 2.3457")
    assert "\x1b" not in terminal.getvalue()


def test_a_reader_that_exits_does_not_stop_training() -> None:
    code = (
        "import sys, time\n"
        "from bardling.monitor.console import Console\n"
        "console = Console(10, 0)\n"
        "console.note('first')\n"
        "sys.stdin.read()\n"  # until the reader has gone
        "for step in range(3): console.log({'kind': 'train', 'step': step, 'loss': 1.0})\n"
        "console.sample(3, '', ['x']); console.close(); print('more')\n"
        "sys.stderr.write('trained to the end')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"trained to the end"
    assert process.wait(timeout=300) == 0
