"""A local server that speaks the protocol of the Hugging Face hub, for models: `server.models[NAME]` holds files by path."""

import contextlib
import hashlib
import http.server
import json
import re
import threading

from http_handler import Handler

COMMIT = "c" * 40


class HubHandler(Handler):
    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        path = self.path.split("?")[0]
        about = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(?:revision|tree)/\w+)?", path)
        file = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/\w+/(.+)", path)
        files = self.server.models.get(about[1] if about else file[1] if file else "")
        if files is None:
            return self.answer(b"{}", 401, X_Error_Code="RepoNotFound")
        if files == "gated":
            return self.answer(b"{}", 403, X_Error_Code="GatedRepo")
        if about and "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
        if about:
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": about[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self.answer(json.dumps(facts).encode(), Content_Type="application/json")
        self.server.fetched.append(file[2])
        data = files[file[2]]
        return self.answer(data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha256(data).hexdigest()}"')


@contextlib.contextmanager
def serve(tmp_path, monkeypatch, constants):
    """The server; `server.fetched` lists the files that were downloaded."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.models, server.fetched = {}, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    yield server
    server.shutdown()
    server.server_close()
