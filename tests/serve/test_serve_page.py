"""Every command and every program in docs/serve.md works."""

import json
import re
import subprocess
import threading
from pathlib import Path

import pytest
from serve_help import running_server

from bardling.cli import serve as command

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]


@pytest.fixture(scope="module")
def server(run):
    with running_server(run) as served:
        yield served


def test_the_page_has_commands_of_each_kind():
    assert len([line for line in SHELL if line.startswith("curl ")]) == 7
    assert len([line for line in SHELL if "bardling serve" in line]) == 4


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("curl ")])
def test_curl(server, line):
    line = line.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl --silent --fail-with-body ", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "/metrics" not in line:
        assert "error" not in json.loads(done.stdout)


def test_programs(server, capsys):
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) == 2
    exec("\n".join(blocks).replace("http://127.0.0.1:8000", server.url), {})
    printed = capsys.readouterr().out
    assert "'T' None" in printed
    assert "'h' -" in printed


@pytest.mark.parametrize("line", [line for line in SHELL if "bardling serve" in line])
def test_serve(run, line, monkeypatch):
    monkeypatch.chdir(run.parents[1])  # the page names runs/first
    variables, _, options = line.partition("bardling serve ")
    if variables:
        monkeypatch.setenv("BARDLING_API_KEY", "a" * 48)
    urls, keys = [], []

    def ready(running, has_key):
        urls.append(running.url)
        keys.append(has_key)
        running.stop()

    monkeypatch.setattr(command, "_print_start", ready)
    thread = threading.Thread(target=command.run, args=([*options.split(), "--port", "0", "--device", "cpu"],))
    thread.start()
    thread.join()
    assert urls[0].startswith("http://")
    assert keys == [bool(variables)]


def test_the_table_of_limits_has_the_options_and_their_defaults():
    rows = dict(re.findall(r"^\| `--(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE))
    defaults = command.ServeOptions()
    assert {name: rows[name] for name in ("slots", "queue", "timeout", "drain")} == {
        name: f"{getattr(defaults, name):g}" for name in ("slots", "queue", "timeout", "drain")
    }
    assert rows["max_body"] == "1 MiB"
    assert defaults.max_body == 1 << 20
    assert {"max_tokens", "memory_gb"} <= set(rows)
