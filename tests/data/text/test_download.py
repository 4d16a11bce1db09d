"""Downloads against a local server that fails in every way that a real one does."""

import contextlib
import hashlib
import http.server
import os
import random
import socket
import threading
import time

import pytest

from bardling.data.text.download import Remote, cache_root, download
from bardling.errors import UserError

CONTENT = random.Random(1).randbytes(300_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
FAST = {"timeout": 5.0, "attempts": 3, "pause": 0.01}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next behaviour in the server's script; the last one is repeated."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.seen.append(dict(self.headers))
        act = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        act(self)

    def send(self, body, status=200, kind="application/octet-stream", length=None, close=False, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if close or length is not None:
            self.close_connection = True
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have left
            self.wfile.write(body)


def whole(handler):
    handler.send(CONTENT)


def ranged(handler):
    """The whole file or what is asked for of it."""
    asked = handler.headers.get("Range")
    if not asked:
        return handler.send(CONTENT)
    start = int(asked.removeprefix("bytes=").rstrip("-"))
    if start >= len(CONTENT):
        return handler.send(b"", status=416)
    return handler.send(CONTENT[start:], status=206, Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")


def cut(handler):
    """The first third, then the connection ends."""
    handler.send(CONTENT[:100_000], length=len(CONTENT))


def status(code, **headers):
    return lambda handler: handler.send(b"<html>sorry</html>", status=code, kind="text/html", **headers)


def hang(handler):
    handler.server.released.wait(60)
    handler.close_connection = True


@pytest.fixture
def serve():
    """`serve(behaviour, ...)`: the address of a file; `serve.seen` are the headers of the requests."""
    servers = []

    def start(*script):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.script, server.seen, server.released = list(script), [], threading.Event()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        start.seen = server.seen
        return f"http://127.0.0.1:{server.server_port}/file.txt"

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def refused(url, folder, match, **options):
    """The download fails with these words, in one line, and leaves nothing under the file's name."""
    with pytest.raises(UserError, match=match) as caught:
        download(Remote((url,), len(CONTENT), SUM), folder / "file", **{**FAST, **options})
    assert "\n" not in str(caught.value)
    assert not (folder / "file").exists()


def test_whole_file_then_no_further_request(serve, tmp_path):
    url = serve(whole)
    remote = Remote((url,), len(CONTENT), SUM)
    assert download(remote, tmp_path / "new" / "file").read_bytes() == CONTENT
    download(remote, tmp_path / "new" / "file")
    assert len(serve.seen) == 1
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == [".file.lock", "file"]


def test_wrong_file_of_that_name_is_replaced(serve, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * len(CONTENT))
    download(Remote((serve(whole),), len(CONTENT), SUM), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("code", [404, 403, 410, 401])
def test_lasting_status_is_refused_at_once(serve, tmp_path, code):
    refused(serve(status(code)), tmp_path, f"answers {code}")
    assert len(serve.seen) == 1


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_passing_status_is_tried_again(serve, tmp_path, code):
    url = serve(status(code), status(code), whole)
    download(Remote((url,), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(serve.seen) == 3


def test_gives_up_after_the_attempts(serve, tmp_path):
    refused(serve(status(500)), tmp_path, r"answers 500 .*\(3 attempts\)")
    assert len(serve.seen) == 3


def test_retry_after_is_heeded(serve, tmp_path):
    begun = time.monotonic()
    download(Remote((serve(status(503, Retry_After="1"), whole),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert time.monotonic() - begun >= 1


def test_cut_connection_goes_on_where_it_stopped(serve, tmp_path):
    download(Remote((serve(cut, ranged),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert serve.seen[1]["Range"] == "bytes=100000-"


def test_server_without_ranges_starts_over(serve, tmp_path):
    download(Remote((serve(cut, whole),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_always_cut_is_refused(serve, tmp_path):
    refused(serve(cut), tmp_path, r"ended after 100,000 of 300,000 bytes \(3 attempts\)")


def test_interrupted_call_is_gone_on_with_by_the_next(serve, tmp_path):
    refused(serve(cut), tmp_path, "ended after", attempts=1)
    assert (tmp_path / "file.part").stat().st_size == 100_000
    download(Remote((serve(ranged),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert serve.seen[0]["Range"] == "bytes=100000-"
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_of_another_file_is_not_built_upon(serve, tmp_path):
    (tmp_path / "file.part").write_bytes(b"other" * 100)
    download(Remote((serve(ranged),), len(CONTENT), SUM), tmp_path / "file", **FAST)  # found by the checksum, fetched again
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 7])
def test_whole_or_too_long_part(serve, tmp_path, size):
    (tmp_path / "file.part").write_bytes((CONTENT + b"another")[:size])
    download(Remote((serve(ranged),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_range_is_not_appended(serve, tmp_path):
    def wrong(handler):
        handler.send(CONTENT[5:], status=206, Content_Range=f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}")

    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    download(Remote((serve(wrong, whole),), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_checksum_and_wrong_sizes(serve, tmp_path):
    refused(serve(lambda h: h.send(CONTENT[:-1] + b"!")), tmp_path, "SHA-256")
    refused(serve(lambda h: h.send(CONTENT[:-1])), tmp_path, "has 299,999 bytes, not the 300,000")
    refused(serve(lambda h: h.send(CONTENT + b"!", length=False, close=True)), tmp_path, "more than the 300,000 bytes")
    refused(serve(lambda h: h.send(b"")), tmp_path, "has 0 bytes, not the 300,000")


def test_web_page_never_becomes_the_text(serve, tmp_path):
    page = b"  <!DOCTYPE html><html>Please log in</html>"
    refused(serve(lambda handler: handler.send(page, kind="text/html; charset=utf-8")), tmp_path, "web page")
    refused(serve(lambda handler: handler.send(page.ljust(len(CONTENT)), kind="text/plain")), tmp_path, "SHA-256")


def test_hanging_server_is_given_up(serve, tmp_path):
    refused(serve(hang), tmp_path, "no answer within 0.2 seconds", timeout=0.2, attempts=2)


def test_body_that_stops_is_gone_on_with(serve, tmp_path):
    def stall(handler):
        handler.send(CONTENT[:50_000], length=len(CONTENT))
        handler.server.released.wait(60)

    download(Remote((serve(stall, ranged),), len(CONTENT), SUM), tmp_path / "file", timeout=2.0, attempts=2, pause=0.01)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert serve.seen[1]["Range"] == "bytes=50000-"


def test_next_mirror_serves_what_the_first_does_not(serve, tmp_path):
    bad, good = serve(status(404)), serve(whole)
    download(Remote((bad, good), len(CONTENT), SUM), tmp_path / "file", **FAST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_no_server_names_address_and_remedy(tmp_path):
    refused("http://127.0.0.1:9/x", tmp_path, r"127.0.0.1:9/x: .*refused.*: check the connection .* --data.source FILE")
    refused("file:///etc/passwd", tmp_path, "no HTTP address")


def test_without_a_network_nobody_waits(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    begun = time.monotonic()
    refused("http://somewhere.invalid/x", tmp_path, "name or service not known", pause=5.0)
    assert time.monotonic() - begun < 4


def test_full_or_read_only_disk_is_told(serve, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken"):
        download(Remote((serve(whole),), len(CONTENT), SUM), tmp_path / "taken" / "file", **FAST)


def test_two_at_once_fetch_it_once(serve, tmp_path):
    remote = Remote((serve(whole),), len(CONTENT), SUM)
    threads = [threading.Thread(target=download, args=(remote, tmp_path / "file")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(serve.seen) == 1


def test_cache_folder_is_the_environments(monkeypatch):
    monkeypatch.setenv("BARDLING_CACHE", "/x/y")
    assert os.fspath(cache_root()) == "/x/y"
    monkeypatch.delenv("BARDLING_CACHE")
    assert cache_root().name == "bardling"
