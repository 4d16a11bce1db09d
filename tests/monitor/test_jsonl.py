"""JSON Lines: everything logged is valid JSON, and a kill at any byte loses at most the last line."""

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.errors import UserError
from bardling.monitor.jsonl import JsonlSink, read_jsonl, truncate_after


def log(path: Path, *steps: int) -> None:
    sink = JsonlSink(path)
    for step in steps:
        sink.log({"kind": "train", "step": step, "loss": 1 / step})
    sink.close()


def test_lines_are_written_immediately_and_appended_later(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"kind": "train", "step": 1, "loss": 2.5})
    assert path.read_text() == '{"kind": "train", "step": 1, "loss": 2.5}\n'
    sink.flush()
    sink.close()
    sink.close()
    log(path, 2)
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_numbers_that_json_lacks_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "m"
    sink = JsonlSink(path)
    sink.log({"step": 1, "loss": math.nan, "a": math.inf, "b": [-math.inf, 1.0], "c": {"d": math.nan}})
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": "NaN", "a": "Infinity", "b": ["-Infinity", 1.0], "c": {"d": "NaN"}}
    assert math.isnan(float(record["loss"]))
    assert float(record["b"][0]) == -math.inf


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters())))
def test_any_text_round_trips_in_one_line(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "samples.jsonl"
    sink = JsonlSink(path)
    record = {"kind": "sample", "step": 7, "prompt": "", "texts": [*texts, "\ud800 alone", "a\nb\u2028c\x85"]}
    sink.log(record)
    sink.close()
    assert read_jsonl(path) == [record]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 6))
def test_a_file_cut_anywhere_can_be_continued(tmp_path_factory: pytest.TempPathFactory, size: int, step: int) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "metrics.jsonl"
    log(path, 1, 2, 3, 4, 5)
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    complete = data.count(b"\n")
    assert [record["step"] for record in read_jsonl(path)] == list(range(1, complete + 1))
    truncate_after(path, step)
    log(path, step + 1)
    assert [record["step"] for record in read_jsonl(path)] == [*range(1, min(complete, step) + 1), step + 1]


def test_truncating_removes_later_steps_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m"
    log(path, 10, 20, 30, 20, 40)
    truncate_after(path, 20)
    assert [record["step"] for record in read_jsonl(path)] == [10, 20, 20]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_nothing_to_remove_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "m"
    log(path, 1, 2)
    before = path.stat()
    truncate_after(path, 2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    truncate_after(tmp_path / "absent", 2)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    "junk", [b"\0" * 50 + b"\n", b"{\n", b'{"kind": "train"}\n', b'{"step": "3"}\n', b"[3]\n", b"\xff\n", b"\n"]
)
def test_junk_after_the_kept_records_is_removed_and_before_them_is_an_error(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "m"
    log(path, 1, 2)
    good = path.read_bytes()
    path.write_bytes(good + junk + b'{"step": 3}\n')
    truncate_after(path, 2)
    assert path.read_bytes() == good
    path.write_bytes(junk + good)
    with pytest.raises(UserError, match="m, line 1: "):
        truncate_after(path, 2)
    assert path.read_bytes() == junk + good


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense", "[" * 100_000])
def test_a_malformed_line_is_reported(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: is "):
        read_jsonl(path)


def test_system_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot write: is a directory"):
        JsonlSink(tmp_path)
    sink = JsonlSink(Path("/dev/full"))
    sink.log({"step": 1})
    with pytest.raises(UserError, match="/dev/full: cannot write: no space left on device: free some space"):
        sink.flush()


def test_a_full_disk_does_not_stop_the_run_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk accepts half a line, then nothing, and later everything again."""
    sink = JsonlSink(tmp_path / "m")
    real = sink._file

    class NearlyFullFile:
        room = 30

        def write(self, data: bytes) -> int:
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = real.write(data[: self.room])
            self.room -= taken
            return taken

        def fileno(self) -> int:
            return real.fileno()

    disk = NearlyFullFile()
    monkeypatch.setattr(sink, "_file", disk)
    for step in (1, 2, 3):
        sink.log({"kind": "train", "step": step})
    assert (tmp_path / "m").stat().st_size == 30
    with pytest.raises(UserError, match="m: cannot write: no space left on device: free some space"):
        sink.flush()
    disk.room = 10_000
    sink.log({"kind": "train", "step": 4})
    assert [record["step"] for record in read_jsonl(tmp_path / "m")] == [1, 2, 3, 4]
    sink.flush()


def test_other_errors_are_raised_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, data: bytes) -> int:
            raise OSError(errno.EIO, "Input/output error")

    sink = JsonlSink(tmp_path / "m")
    monkeypatch.setattr(sink, "_file", Broken())
    with pytest.raises(UserError, match="m: cannot write: input/output error"):
        sink.log({"step": 1})
