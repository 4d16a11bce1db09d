"""The `bardling` command lets PyTorch use huge pages, unless the user has configured it."""

import subprocess
import sys

import pytest

from bardling.distributed.huge_pages import VARIABLE, use_huge_pages


@pytest.mark.parametrize(
    ("system", "said", "expected"), [("linux", {}, "1"), ("linux", {VARIABLE: "0"}, "0"), ("darwin", {}, None)]
)
def test_on_linux_unless_configured(monkeypatch, system, said, expected):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = dict(said)
    use_huge_pages(environment)
    assert environment.get(VARIABLE) == expected


def test_after_torch_it_is_too_late(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    environment = {}
    use_huge_pages(environment)
    assert environment == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for Linux")
def test_the_command_sets_it_before_it_imports_torch(tmp_path):
    script = (
        "import os, sys; from bardling.cli.main import main\n"
        "try: main(['info', 'nothing'])\n"
        f"except SystemExit as end: print(end.code, os.environ.get('{VARIABLE}'))"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["2", "1"]
