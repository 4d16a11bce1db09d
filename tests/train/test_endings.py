"""How a run ends when its files cannot be written: everything is closed, and the line that says how to go on comes last."""

import errno

import pytest

from bardling.checkpoint.runfolder import RunFolder
from bardling.errors import UserError
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink
from bardling.monitor.services import Services
from bardling.train import run as running
from bardling.train.monitoring import RunMonitor
from bardling.train.run import train


@pytest.fixture
def closed(monkeypatch):
    """What was closed, by the names of its classes."""
    found = []

    def watch(kind):
        real = kind.close

        def close(self):
            found.append(kind.__name__)
            real(self)

        monkeypatch.setattr(kind, "close", close)

    for kind in (Console, Services):
        watch(kind)
    return found


@pytest.fixture
def undone(monkeypatch):
    """The devices whose settings were put back."""
    found = []
    monkeypatch.setattr(running, "prepare_backend", lambda device, **_: lambda: found.append(device))
    return found


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(text)`: from the first line with `text` on, no line finds room."""
    real = JsonlSink._write

    def fill(text):
        full = []

        def write(self):
            if full or text in self._waiting:
                full.append(1)
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self)

        monkeypatch.setattr(JsonlSink, "_write", write)

    return fill


def test_a_full_disk_ends_a_run_with_how_to_go_on(tiny, tmp_path, closed, undone, full_disk):
    full_disk(b'"step": 15')
    with pytest.raises(UserError, match=r"the state at step 30 could not be saved \(.*\).*bardling resume "):
        train(tiny, tmp_path / "run")
    assert closed == ["Services", "Console"]
    assert len(undone) == 1


def test_figures_that_find_no_room_at_the_very_end_are_said(tiny, tmp_path, closed, undone, full_disk, monkeypatch):
    real = RunMonitor.close

    def close(self):
        full_disk(b"")
        real(self)

    monkeypatch.setattr(RunMonitor, "close", close)
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written .*make room"):
        train(tiny, tmp_path / "run")
    assert closed == ["Services", "Console"]
    assert len(undone) == 1


def test_settings_are_put_back_when_a_run_cannot_begin(tiny, tmp_path, undone, monkeypatch):
    def refuse(*_, **__):
        raise UserError("no")

    monkeypatch.setattr(running, "build_state", refuse)
    with pytest.raises(UserError, match="no"):
        train(tiny, tmp_path / "run", quiet=True)
    assert len(undone) == 1


def test_the_terminal_is_given_back_when_the_files_cannot_be_opened(tiny, tmp_path, closed):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunMonitor(RunFolder(tmp_path), tiny, 0, primary=True, quiet=False)
    assert closed == ["Console"]
