"""`bardling serve` as a program: what it prints, signals, options that cannot be used."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from serve_help import write_folder

from bardling.cli.main import main


def start(*argv, **environment):
    """Start the command; returns the process, its URL and what it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bardling", "serve", *map(str, argv), "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("Next:"):
            break
    else:
        raise AssertionError(process.stderr.read())
    return process, re.search(r"http://[\w.:]+", printed)[0], printed


def stream(url: str, key: str = "", **body):
    """A stream of completions that has begun."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    content = {"prompt": "a", "stream": True, "logit_bias": {"256": -100}, **body}
    response = urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", json.dumps(content).encode(), headers))
    response.readline()
    return response


def test_start_and_stop(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    process, url, printed = start(folder, BARDLING_API_KEY="key-of-a-test")
    try:
        lines = printed.strip().splitlines()
        assert re.fullmatch(rf"Next: open {url}/ in a browser, .*Ctrl-C stops the server\.", lines[-1])
        assert any(re.fullmatch(r"models +tiny", line.strip()) for line in lines)
        (command,) = [line for line in lines if line.startswith("curl ")]
        assert "$BARDLING_API_KEY" in command
        assert "key-of-a-test" not in printed
        environment = {**os.environ, "BARDLING_API_KEY": "key-of-a-test"}
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=environment)
        assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
        response = stream(url, "key-of-a-test", max_tokens=120)
        process.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 0
        errors = process.stderr.read()
        assert "Traceback" not in errors
        assert re.fullmatch(r"(bardling: finishing 1 running request.*\n)?", errors)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    from dataclasses import replace

    from serve_help import CONFIG

    process, url, _ = start(write_folder(tmp_path / "long", replace(CONFIG, block_size=50_000)))
    try:
        response = stream(url, max_tokens=40_000)
        process.send_signal(signal.SIGINT)
        assert "finishing 1 running request" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        response.close()
    finally:
        process.kill()


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *map(str, argv)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_port_in_use(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(capsys, folder, "--port", port)
    assert re.search(rf"--port {port}: address already in use: .*--port {port + 1}", message)


def test_options_that_cannot_be_used(folder, capsys, tmp_path):
    assert "BARDLING_API_KEY" in refused(capsys, folder, "--host", "0.0.0.0")
    assert "--slots 0" in refused(capsys, folder, "--slots", "0")
    assert "no such folder" in refused(capsys, tmp_path / "missing")
    assert "cannot be used" in refused(capsys, folder, "--host", "256.256.256.256", "--insecure")


def test_without_a_model_it_lists_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "bardling train quickstart --out runs/first" in refused(capsys)
    for name in ("one", "two words"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    message = refused(capsys)
    assert "`bardling serve " in message
    assert "runs/one" in message
    assert "'runs/two words'" in message


def test_a_missing_package_names_the_extra(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("bardling.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.responses", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert "pip install 'bardling[serve]'" in refused(capsys, folder)
