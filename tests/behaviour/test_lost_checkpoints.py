"""A run whose checkpoints are gone is refused instead of starting again at step 0, which would empty its metrics."""

import json
import shutil

import pytest

from bardling.cli.main import main
from bardling.errors import UserError
from bardling.training.run import resume, train


@pytest.fixture
def run(tiny, change, tmp_path):
    return train(change(tiny, train={"steps": 4}, optim={"warmup_steps": 1}), tmp_path / "run", quiet=True).folder


def remove_folder(run):
    shutil.rmtree(run / "checkpoints")


def remove_contents(run):
    for entry in (run / "checkpoints").iterdir():
        shutil.rmtree(entry)


def replace_by_dangling_link(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(run / "elsewhere")


@pytest.mark.parametrize("lose", [remove_folder, remove_contents, replace_by_dangling_link])
@pytest.mark.parametrize("command", ["resume", "eval", "sample"])
def test_lost_checkpoints_are_named_and_nothing_changes(run, lose, command, capsys):
    lose(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, str(run)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    remedy = "restore one from a copy, or start a new run"
    assert error == f"bardling: {run}/checkpoints: every checkpoint of this run is gone: {remedy}\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resumed_run_is_known_to_have_had_a_checkpoint(run):
    """Also one of a version that did not record its checkpoints."""
    environment = json.loads((run / "environment.json").read_text())
    del environment["saved"]
    (run / "environment.json").write_text(json.dumps(environment))
    resume(run, quiet=True)
    remove_folder(run)
    with pytest.raises(UserError, match="every checkpoint of this run is gone"):
        resume(run, quiet=True)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(run, tiny, change, tmp_path, monkeypatch):
    whole = (run / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bardling.training.session.Saver.save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(change(tiny, train={"steps": 4}, optim={"warmup_steps": 1}), tmp_path / "killed", quiet=True)
    assert resume(tmp_path / "killed", quiet=True).step == 4
    assert (tmp_path / "killed" / "checkpoints" / "step-000004" / "model.safetensors").read_bytes() == whole
