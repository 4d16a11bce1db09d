"""`bardling export --push` against a local server that speaks the hub's protocol for uploads."""

import pytest

from bardling.cli.main import main
from bardling.training.run import train
from upload_hub import serve

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch):
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def run(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}, optim={"warmup_steps": 0}, sample={"every": 0}), tmp_path / "run", quiet=True)
    return tmp_path / "run"


@pytest.fixture
def refused(capsys):
    """Run a command that is refused; returns its message, which is one line."""

    def command(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return command


def test_a_folder_is_published_privately(hub, run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "hf"), "--push", "user/model"])
    (created,) = hub.created
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert hub.tokens == {"Bearer secret"}
    assert f"published: {hub.address}/user/model" in capsys.readouterr().out


def test_a_file_is_published_and_public_if_asked(hub, run, tmp_path):
    pytest.importorskip("gguf")
    main(["export", str(run), "--format", "gguf", "--out", str(tmp_path / "a.gguf"), "--push", "user/model", "--public"])
    (created,) = hub.created
    assert created.get("private") is not True
    assert created.get("visibility") != "private"
    assert hub.files == {"a.gguf": (tmp_path / "a.gguf").read_bytes()}


@pytest.mark.parametrize(("status", "remedy"), [(403, "use a token that may write there"), (500, "try again later")])
def test_a_refused_upload_is_one_line_and_the_export_stays(status, remedy, hub, run, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    message = refused("export", run, "--out", tmp_path / "hf", "--push", "user/model")
    assert f"--push user/model: the hub refused it with status {status}: {remedy}" in message
    assert "secret" not in message
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_wrong_name_or_a_missing_token_is_refused_before_the_export(run, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "must be USER/REPO" in refused("export", run, "--out", tmp_path / "hf", "--push", "model")
    assert "set HF_TOKEN" in refused("export", run, "--out", tmp_path / "hf", "--push", "user/model")
    assert not (tmp_path / "hf").exists()
