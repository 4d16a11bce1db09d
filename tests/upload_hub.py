"""A local server that speaks the Hugging Face hub's protocol for uploads of small files."""

import base64
import contextlib
import http.server
import json
import threading

from http_handler import Handler

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


@contextlib.contextmanager
def serve(monkeypatch):
    """The server: `created` lists the requests for repositories, `files` the uploaded files, `tokens` who asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), UploadHandler)
    server.created, server.files, server.tokens, server.status = [], {}, set(), 200
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)  # read from the variable when it is imported
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield server
    server.shutdown()
    server.server_close()
