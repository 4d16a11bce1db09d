"""A run whose files cannot be written closes everything and ends with an error that tells how to continue."""

import errno
from contextlib import contextmanager

import pytest

from bardling.checkpoint.run_folder import RunFolder
from bardling.errors import UserError
from bardling.monitor import RunInfo
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink
from bardling.monitor.services import Services
from bardling.training import run as run_module
from bardling.training import session
from bardling.training.run import train
from bardling.training.run_monitor import RunMonitor


@pytest.fixture
def closed(monkeypatch):
    """Class names of what was closed."""
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
def restored(monkeypatch):
    """The devices whose backend settings were restored."""
    found = []

    @contextmanager
    def backend(device, **_):
        try:
            yield
        finally:
            found.append(device)

    monkeypatch.setattr(run_module, "backend", backend)
    return found


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(text)`: the disk is full from the first line that contains `text`."""
    real = JsonlSink._write

    def fill(text):
        full = []

        def write(self):
            if full or text in self._pending:
                full.append(1)
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self)

        monkeypatch.setattr(JsonlSink, "_write", write)

    return fill


def test_a_full_disk_ends_a_run_with_a_resume_command(tiny, tmp_path, closed, restored, full_disk):
    full_disk(b'"step": 15')
    with pytest.raises(UserError, match=r"the state at step 30 could not be saved \(.*\).*bardling resume "):
        train(tiny, tmp_path / "run")
    assert closed == ["Services", "Console"]
    assert len(restored) == 1


def test_metrics_that_cannot_be_flushed_at_the_end_are_reported(tiny, tmp_path, closed, restored, full_disk, monkeypatch):
    real = RunMonitor.close

    def close(self):
        full_disk(b"")
        real(self)

    monkeypatch.setattr(RunMonitor, "close", close)
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot write: .*free some space"):
        train(tiny, tmp_path / "run")
    assert closed == ["Services", "Console"]
    assert len(restored) == 1


def test_backend_settings_are_restored_when_a_run_cannot_start(tiny, tmp_path, restored, monkeypatch):
    def refuse(*_, **__):
        raise UserError("no")

    monkeypatch.setattr(session, "build", refuse)
    with pytest.raises(UserError, match="no"):
        train(tiny, tmp_path / "run", quiet=True)
    assert len(restored) == 1


def test_the_terminal_is_restored_when_files_cannot_be_opened(tiny, tmp_path, closed):
    (tmp_path / "metrics.jsonl").mkdir()
    info = RunInfo(folder=tmp_path, step=0, config=tiny.monitor, values={}, recipe="", report=print)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunMonitor(RunFolder(tmp_path), info, 30, prompt="", primary=True, quiet=False)
    assert closed == ["Console"]
