"""The checks of the code's shape find what they are for."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "house.py"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """The script, on a package that a test writes with `write`."""
    spec = importlib.util.spec_from_file_location("house", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = tmp_path / "src" / "bardling"
    package.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", package)
    contract = (
        '[tool.importlinter]\ncontracts = [{ layers = ["bardling.top", "bardling.left | bardling.right", "bardling.base"] }]\n'
    )
    (tmp_path / "pyproject.toml").write_text(contract)

    def write(**files):
        for name, text in {"__init__": "", **files}.items():
            (package / f"{name}.py").write_text(text)

    module.write = write
    return module


def test_a_small_package_has_no_problems(house, capsys):
    house.write(top="import bardling.left\n", left="from bardling import base\n", base="x = 1\n")
    assert house.check() == 0
    assert "0 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"base": "x = 1\n" * 401}, "src/bardling/base.py has 401 lines"),
        ({"base": "def long():\n" + "    x = 1\n" * 60}, "src/bardling/base.py:1 long (61 lines)"),
        (
            {"left": "import bardling.base\n", "base": "def f():\n    from bardling.left import x\n"},
            "import cycle: bardling.base",
        ),
        (
            {"left": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bardling.top import T\n", "top": ""},
            "layers: bardling.left imports bardling.top",
        ),
        ({"left": "from bardling import right\n", "right": ""}, "layers: bardling.left imports bardling.right"),
        ({f"file{n}": "x = 1\n" * 399 for n in range(100)}, "lines of source"),
    ],
    ids=["file", "function", "cycle", "up", "sideways", "total"],
)
def test_each_limit_is_checked(house, capsys, files, problem):
    house.write(**files)
    assert house.check() == 1
    assert problem in capsys.readouterr().out


def test_a_configuration_passes_through_few_files_and_returns_to_none(tmp_path, corpus):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f'device = "cpu"\nprecision = "float32"\n[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 8\n'
        f'[data]\nsource = "{corpus}"\ntokenizer = "byte"\n[train]\nsteps = 3\nbatch_size = 2\n[optim]\nwarmup_steps = 1\n'
    )
    done = subprocess.run([sys.executable, SCRIPT, "--trace", recipe], capture_output=True, text=True, timeout=300, check=True)
    *files, summary = done.stdout.splitlines()
    assert files[0].split()[-1] == "training/run.py"
    assert "(again)" not in done.stdout
    count = int(summary.split()[0])
    assert summary == f"{count} files, 0 returns to a file left before"
    assert 5 <= count <= 12
