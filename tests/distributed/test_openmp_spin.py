"""The `bardling` command limits the spinning of OpenMP threads, unless the user has configured it."""

import platform
import subprocess
import sys

import pytest

from bardling.distributed.openmp_spin import SPIN_COUNT, limit_spinning


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delitem(sys.modules, "torch")


def test_it_is_set(linux):
    environment = {}
    limit_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}])
def test_user_settings_are_kept(linux, said):
    environment = dict(said)
    limit_spinning(environment)
    assert environment == said


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_other_machines_are_left_alone(linux, monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    environment = {}
    limit_spinning(environment)
    assert environment == {}


def test_after_torch_it_is_too_late(linux, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    environment = {}
    limit_spinning(environment)
    assert environment == {}


@pytest.mark.skipif(not (sys.platform.startswith("linux") and platform.machine() == "x86_64"), reason="for Linux on x86-64")
def test_the_command_sets_it_before_it_imports_torch(tmp_path):
    script = (
        "import os, sys; sys.modules.pop('torch', None); from bardling.cli.main import main\n"
        "try: main(['info', 'nothing'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.split()[0] == "2"
    assert said.stdout.split()[2] == str(SPIN_COUNT)
