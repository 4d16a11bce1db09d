"""Who may call the server, and what it answers to everything that is not a request it knows."""

import contextlib
import re
import socket

import pytest
from serve_help import running_server

from bardling.errors import UserError
from bardling.serve.settings import Settings

KEY = "a-secret-of-the-tests"


@pytest.fixture(scope="module")
def guarded(folder):
    with running_server(folder, key=KEY, allow_origin="https://page.example", max_body=2_000) as served:
        yield served


def test_every_endpoint_but_the_page_and_healthz_needs_the_key(guarded):
    paths = ["/v1/models", "/metrics", "/v1/completions", "/tokenize", "/nothing"]
    for header in (None, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", "Bearer \xff".encode("latin-1")):
        for path in paths:
            answer = guarded.http.get(path, headers={"Authorization": b"" if header is None else header})
            assert answer.status_code == 401, (header, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    for path in ("/", "/healthz"):
        assert guarded.http.get(path, headers={"Authorization": ""}).status_code == 200
    assert guarded.http.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_other_pages_may_not_use_the_server(guarded):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://page.example.evil.example"):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("OPTIONS", "/v1/completions")):
            answer = guarded.http.request(method, path, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
            assert answer.status_code == 403, (origin, method)
            assert answer.json()["error"]["code"] == "wrong_origin"
            assert "access-control-allow-origin" not in answer.headers
    assert guarded.http.get("/v1/models", headers={"Origin": guarded.url}).status_code == 200


def test_one_origin_can_be_allowed(guarded):
    origin = {"Origin": "https://page.example"}
    asked = guarded.http.request(
        "OPTIONS", "/v1/completions", headers={**origin, "Access-Control-Request-Method": "POST", "Authorization": ""}
    )
    assert asked.status_code == 204
    for answer in (asked, guarded.http.get("/v1/models", headers=origin)):
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in guarded.http.get("/v1/models").headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "", "localhost."])
def test_a_name_that_resolves_to_this_machine_is_not_enough(guarded, host):
    answer = guarded.http.get("/healthz", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1"])
def test_names_of_this_machine(guarded, host):
    assert guarded.http.get("/healthz", headers={"Host": host}).json() == {"status": "ok"}


def test_unknown_paths_and_methods(guarded):
    for method, path, status in (
        ("GET", "/v2/models", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/../../etc/passwd", 404),
    ):
        answer = guarded.http.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert guarded.http.get("/v1/completions").headers["allow"] == "POST"


def test_bodies(guarded):
    for body, status in (
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"temperature": NaN, "prompt": "a"}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 1_900 + b"}", 400),
        (b"[" * 1_990, 400),
        (b'{"prompt": "' + b"a" * 2_000 + b'"}', 413),
    ):
        answer = guarded.http.post("/v1/completions", content=body)
        assert answer.status_code == status, body[:40]
        assert "Traceback" not in answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "request_text",
    [
        b"nonsense\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 65_600,
    ],
)
def test_malformed_http(guarded, request_text):
    with connect(guarded, request_text) as connection:
        answer = connection.makefile("rb").read()
    assert re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert b'"invalid_request_error"' in answer or b'"authentication_error"' in answer


def connect(served, data: bytes) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_client_that_sends_no_complete_request_is_disconnected(guarded, monkeypatch, data):
    monkeypatch.setattr("bardling.serve.protocol._HEADER_SECONDS", 0.2)
    with connect(guarded, data) as connection:
        answer = connection.makefile("rb").read()  # until the server closes the connection
    assert (b"200 OK" in answer) == (b"healthz" in data)


def test_a_body_that_does_not_arrive(guarded, monkeypatch):
    monkeypatch.setattr("bardling.serve.app._BODY_SECONDS", 0.2)
    head = f"POST /tokenize HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n{{"
    with connect(guarded, head.encode()) as connection:
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"timeout"' in answer


def test_connections_are_limited(guarded, monkeypatch):
    guarded.http.get("/healthz")
    monkeypatch.setattr("bardling.serve.protocol._MAX_CONNECTIONS", 2)
    with connect(guarded, b"GET") as kept, connect(guarded, b"") as refused:
        with contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        kept.sendall(b" /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in kept.makefile("rb").read()


def test_the_page_runs_only_its_own_script(served):
    answer = served.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_public_address_needs_a_key():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(UserError, match="BARDLING_API_KEY"):
            Settings(host=host).check()
        Settings(host=host, api_key=KEY).check()
        assert Settings(host=host, insecure=True).local_hosts is None
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert Settings(host=host).local_hosts >= {"localhost", host}


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"slots": 0},
        {"queue": -1},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"memory_gb": 0},
        {"api_key": "short"},
        {"api_key": "with a space in it"},
        {"allow_origin": "*"},
        {"allow_origin": "https://page.example/"},
        {"allow_origin": "page.example"},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=r"^(--\w+|the API key) .*must"):
        Settings(**wrong).check()
