"""`bardling export --push` against a local server that speaks the hub's protocol for uploads."""

import base64
import contextlib
import http.server
import json
import threading

import pytest

from bardling.cli.main import main
from bardling.training.run import train
from http_handler import Handler

pytest.importorskip("huggingface_hub")
COMMIT = "c" * 40


class UploadHandler(Handler):
    """Accepts files as base64 in one commit, as the hub does for small ones."""

    def do_POST(self):  # noqa: N802 (the name that http.server calls)
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        server.tokens.add(self.headers.get("Authorization"))
        if server.status != 200:
            return self.json({"error": "no"}, server.status)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.json({"url": f"{server.address}/user/model", "name": "user/model"})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.json({"commitUrl": f"{server.address}/user/model/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self):  # noqa: N802
        self.json({"id": "user/model", "sha": COMMIT, "siblings": [], "tags": [], "private": True})

    def json(self, value, status=200):
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json")


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), UploadHandler)
    server.created, server.files, server.tokens, server.status = [], {}, set(), 200
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield server
    server.shutdown()
    server.server_close()


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
    with contextlib.suppress(FileNotFoundError):
        assert not (tmp_path / "hf").exists()
