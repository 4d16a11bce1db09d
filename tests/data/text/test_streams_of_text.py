"""Text that is read over the network or from standard input: the same documents as from a file, and no credentials anywhere."""

import gzip
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_formats import FORMATS, TEXTS, lines, packed, tar

from bardling.config import DataConfig
from bardling.data.text.opening import without_secrets
from bardling.data.text.sources import open_source
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import open_dataset
from bardling.errors import UserError
from http_handler import Handler

fsspec = pytest.importorskip("fsspec")


def texts(spec: str, **options) -> list[str]:
    return [document.text for document in open_source(spec, **options).documents()]


class Files(Handler):
    """Serves `server.files`, with ranges unless `server.plain`, to users who send `server.user`."""

    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        path, _, query = self.path.partition("?")
        self.server.seen.append((path, query, self.headers.get("Authorization", "")))
        if self.server.signature and query != self.server.signature:
            return self.answer(b"forbidden", 403)
        data = self.server.files.get(path.lstrip("/"))
        if data is None:
            return self.answer(b"none", 404)
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        bounds = self.headers.get("Range", "")
        if self.server.plain or not bounds:
            return self.answer(data, **etag, **({} if self.server.plain else {"Accept-Ranges": "bytes"}))
        first, _, last = bounds.removeprefix("bytes=").partition("-")
        end = min(int(last or len(data) - 1), len(data) - 1) + 1
        more = {"Content_Range": f"bytes {first}-{end - 1}/{len(data)}", "Accept-Ranges": "bytes"}
        return self.answer(data[int(first) : end], 206, **etag, **more)


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    found.files, found.plain, found.seen, found.signature = {}, False, [], ""
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    found.url = f"http://127.0.0.1:{found.server_port}"
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("plain", [False, True])
def test_files_of_a_web_server(server, plain: bool) -> None:
    server.plain = plain
    for name in FORMATS:
        server.files[name] = FORMATS[name]()
        assert texts(f"{server.url}/{name}") == TEXTS, name
    server.files |= {
        "a.jsonl.gz": gzip.compress(lines()),
        "a.zip": packed({"a.jsonl": lines()}),
        "a.tar": tar({"a.jsonl": lines()}),
    }
    for name in ("a.jsonl.gz", "a.zip", "a.tar"):
        assert texts(f"{server.url}/{name}") == TEXTS, name
    assert texts(f"{server.url}/a.jsonl:title") == ["First", "Second"]


def test_the_identity_of_a_url_follows_its_content(server) -> None:
    server.files["a.txt"] = b"one"
    before = open_source(f"{server.url}/a.txt").identity()
    assert open_source(f"{server.url}/a.txt").identity() == before
    server.files["a.txt"] = b"two"
    assert open_source(f"{server.url}/a.txt").identity() != before


def test_credentials_are_used_and_shown_nowhere(server, tmp_path: Path) -> None:
    server.files["a.jsonl"], server.signature = lines(), "X-Signature=s3cr3t"
    secret = f"{server.url.replace('//', '//me:p4ss@')}/a.jsonl?{server.signature}"
    dataset = prepare(secret, tmp_path / "ds", "byte")
    assert server.seen[-1][1] == server.signature
    assert dataset.manifest.source["spec"] == f"{server.url}/a.jsonl"
    server.signature = "other"
    with pytest.raises(UserError) as refused:
        prepare(secret, tmp_path / "ds2", "byte")
    with pytest.raises(UserError, match="bardling prepare URL --out DIR") as trained:
        open_data(DataConfig(source=secret, cache=str(tmp_path / "cache")))
    server.signature = "X-Signature=s3cr3t"
    server.files["a.jsonl"] += b"not JSON\n"
    with pytest.raises(UserError, match="line 3 is not JSON") as malformed:
        prepare(secret, tmp_path / "ds3", "byte")
    everything = [str(error.value) for error in (refused, trained, malformed)]
    everything += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [one for one in everything if "s3cr3t" in one or "p4ss" in one]


def test_what_a_server_or_an_address_refuses(server, tmp_path: Path) -> None:
    server.files["cut.jsonl.gz"] = gzip.compress(lines() * 99)[:-9]
    for spec, message in {
        f"{server.url}/none.txt": "cannot be read \\(not found\\)",
        f"{server.url}/cut.jsonl.gz": "is damaged gzip data",
        "http://127.0.0.1:1/a.txt": "cannot be read",
        "nothing://a/b.txt": "fsspec has no protocol 'nothing'",
        "simplecache::memory://a/b.txt": "chained URLs are not supported",
        "memory://nothing/b.txt": "cannot be read \\(not found\\)",
        "memory://nothing/*.txt": "no file matches this pattern",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            prepare(spec, tmp_path / "ds", "byte")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_protocol_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="needs the package s3fs: pip install s3fs"):
        open_source("s3://bucket/a.txt")


def test_folders_and_patterns_of_a_file_system() -> None:
    system = fsspec.filesystem("memory")
    for name, data in {
        "b.txt": b"B",
        "a.jsonl": lines(),
        "deep/c.csv": FORMATS["a.csv"](),
        "noise.bin": b"\x89PNG\r\n",
    }.items():
        system.pipe(f"/corpus/{name}", data)
    try:
        assert texts("memory://corpus/*.txt") == ["B"]
        source = open_source("memory://corpus")
        found = list(source.documents())
        assert [document.text for document in found] == [*TEXTS, "B", *TEXTS]
        assert [document.name for document in found][:3] == ["a.jsonl:1", "a.jsonl:2", "b.txt"]
        assert source.findings.facts()["left_out"] == {"PNG image": {"count": 1, "names": ["noise.bin"]}}
        assert texts("memory://corpus/*.jsonl", field="title") == ["First", "Second"]
    finally:
        system.rm("/corpus", recursive=True)


def test_a_file_url_is_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert open_source(f"file://{tmp_path}/a.txt").identity() == open_source(str(tmp_path / "a.txt")).identity()


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("s3://bucket/a.txt", "s3://bucket/a.txt"),
        ("https://me:secret@host:8080/a.txt?sig=x&y=/z#f", "https://host:8080/a.txt"),
        ("https://host?sig=secret", "https://host"),
        ("a@b.txt?x", "a@b.txt?x"),
    ],
)
def test_addresses_without_secrets(spec: str, shown: str) -> None:
    assert without_secrets(spec) == shown


def bardling(*arguments: object, data: bytes, cache: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "bardling", *map(str, arguments)]
    environment = {**os.environ, "BARDLING_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=data, env=environment, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize("name", ["gzip", "csv"])
def test_standard_input_is_prepared_like_a_file(tmp_path: Path, name: str) -> None:
    options = {"csv": ("--field", "{title}: {text}")}.get(name, ())
    data = {"gzip": gzip.compress(lines()), "csv": FORMATS["a.csv"]()}[name]
    done = bardling("prepare", "-", "--out", tmp_path / "ds", *options, data=data, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    (tmp_path / ("a.csv" if name == "csv" else "a")).write_bytes(data)
    same = prepare(str(tmp_path / ("a.csv" if name == "csv" else "a")), tmp_path / "ds2", "byte", field="".join(options[1:]))
    assert open_dataset(tmp_path / "ds").fingerprint == same.fingerprint
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"]


def test_standard_input_that_cannot_be(tmp_path: Path) -> None:
    done = bardling("prepare", "-", "--out", tmp_path / "ds", data=b"", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert b"is empty" in done.stderr
    assert not (tmp_path / "ds").exists()
    with pytest.raises(UserError, match="run `bardling prepare - --out DIR`"):
        open_data(DataConfig(source="-"))
