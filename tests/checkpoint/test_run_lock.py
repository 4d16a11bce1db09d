"""A run belongs to one job at a time, and what earlier ones have left of it is taken up or cleared away."""

import json
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from bardling.checkpoint import disk_space as space
from bardling.checkpoint import run_folder
from bardling.checkpoint.export import export_nanogpt
from bardling.checkpoint.load import load_tokenizer_of
from bardling.checkpoint.run_folder import RunFolder
from bardling.checkpoint.saver import Saver
from bardling.checkpoint.store import CheckpointStore
from bardling.errors import JobLost, UserError
from bardling.files.lock import locked
from bardling.training.run import resume, train

HOLDS = """
import sys, time
from pathlib import Path
from bardling.files.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if record["kind"] == "train"]


def killed(*_, **__):
    raise KeyboardInterrupt


def lost(*_, **__):
    raise JobLost("another process ended")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_second_job_is_refused_and_changes_nothing(tiny, change, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.1)
    run = tmp_path / "run"
    train(tiny, run, quiet=True)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with locked(RunFolder(run).lock_file):
        with pytest.raises(UserError, match=r"run: another process is training this run: wait for it to finish, or stop it"):
            resume(run, change(tiny, train={"steps": 40}), quiet=True)
        assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == {**before, ".lock": b""}
    with locked(RunFolder(tmp_path / "new").lock_file), pytest.raises(UserError, match="new: another process is training"):
        train(tiny, tmp_path / "new", quiet=True)
    train(tiny, tmp_path / "new", quiet=True)  # a lock file alone does not make it a run
    assert not (tmp_path / "new" / ".lock").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_killed_job_lets_go(tiny, change, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 60.0)  # a busy machine takes its time to end a process
    run = tmp_path / "run"
    train(tiny, run, quiet=True)
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(RunFolder(run).lock_file)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    assert resume(run, change(tiny, train={"steps": 32}), quiet=True).step == 32
    child.wait(300)


def test_a_continued_run_that_never_saved_goes_on_from_where_it_was_taken_up(tiny, change, tmp_path, monkeypatch):
    train(tiny, tmp_path / "before", quiet=True)
    export_nanogpt(str(tmp_path / "before"), tmp_path / "other")
    longer = change(tiny, train={"steps": 36}, optim={"schedule": "constant"})
    monkeypatch.chdir(tmp_path)
    whole = train(longer, tmp_path / "whole", continue_from="other/ckpt.pt", quiet=True).folder
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", lost)
        with pytest.raises(JobLost):
            train(longer, tmp_path / "run", continue_from="other/ckpt.pt", quiet=True)
    assert RunFolder(tmp_path / "run").config_file.exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(tmp_path / "run", quiet=True)
    assert steps(tmp_path / "run") == steps(whole)
    assert steps(whole)[0][0] == 31


def test_weights_to_begin_with_are_found_from_any_folder(tiny, change, tmp_path, monkeypatch):
    train(tiny, tmp_path / "first", quiet=True)
    monkeypatch.chdir(tmp_path)
    tuned = change(tiny, model={"init": "first"}, data={"cache": "cache"})
    config = RunFolder(train(tuned, tmp_path / "second", quiet=True).folder).config()
    assert (config.model.init, config.data.cache) == (str(tmp_path / "first"), str(tmp_path / "cache"))
    resume("second", change(tuned, train={"steps": 31}), quiet=True)


def test_files_of_a_start_that_was_killed_do_not_enter_the_next(tiny, change, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", killed)
        with pytest.raises(KeyboardInterrupt):
            train(change(tiny, data={"tokenizer": "byte"}), run, quiet=True)
    (run / "tokenizer_config.json").write_text("another's")
    train(tiny, run, quiet=True)
    assert json.loads((run / "tokenizer_config.json").read_text())
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 1
    assert load_tokenizer_of(str(run)).vocab_size < 100


def test_a_tokenizer_of_the_users_own_is_no_remains(tiny, tmp_path):
    out = tmp_path / "tokenizer"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        train(tiny, out, quiet=True)
    assert (out / "tokenizer.json").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]


def test_what_a_killed_save_has_left_is_free_space(tiny, change, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(change(tiny, checkpoint={"every": 0, "keep_last": 1}), run, quiet=True)

    def size() -> int:
        return sum(path.lstat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())

    one = size()
    left = run / "checkpoints" / ".tmp-step-000040-1"  # of a process whose number another one has now
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(one))
    usage = namedtuple("usage", "total used free")
    disk = type("shutil", (), {"disk_usage": staticmethod(lambda _: usage(0, 0, 0)._replace(total=1, free=3 * one - size()))})
    monkeypatch.setattr(space, "shutil", disk)
    resume(run, change(tiny, train={"steps": 40}, checkpoint={"every": 0, "keep_last": 1}), quiet=True)
    assert not left.exists()


def test_leftovers_of_a_living_process_stay_unless_one_is_alone(tmp_path):
    left = tmp_path / ".tmp-step-000010-1"
    left.mkdir()
    CheckpointStore(tmp_path, 1).tidy()
    assert left.exists()
    CheckpointStore(tmp_path, 1).tidy(exclusive=True)
    assert not left.exists()
