"""A signal during `bardling.train` in a script: the run is saved, then the signal reaches the script."""

import os
import signal
import subprocess
import sys

import pytest

import bardling
from bardling.config.recipes import config_to_toml
from bardling.training import step as module

TWO_RUNS = """
import os, sys
import bardling
from bardling.training import step as module

folder, number = sys.argv[1], int(sys.argv[2])
config, original, calls = bardling.load_recipe(f"{folder}/recipe.toml"), module.set_learning_rate, 0

def signalled(*arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), number)
    return original(*arguments)

module.set_learning_rate = signalled
for name in ("first", "second"):
    try:
        bardling.train(config, f"{folder}/{name}", quiet=True)
    except Exception:
        print("an ordinary error")
    finally:
        print("clean-up of", name)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_loop_of_two_runs_ends_with_the_first(tiny, tmp_path, number, status):
    (tmp_path / "recipe.toml").write_text(config_to_toml(tiny))
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path), str(int(number))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert done.stdout == "clean-up of first\n"
    assert (tmp_path / "first" / "checkpoints" / "step-000003" / "model.safetensors").is_file()
    assert not (tmp_path / "second").exists()
    assert bardling.resume(tmp_path / "first", quiet=True).step == tiny.train.steps


@pytest.fixture
def interrupt(monkeypatch):
    original = module.set_learning_rate

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(module, "set_learning_rate", signalled)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_program_with_a_handler_of_its_own_gets_an_exit_status_and_its_handler_back(tiny, tmp_path, interrupt):
    received = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    mine = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        bardling.train(tiny, tmp_path / "run", quiet=True)
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is mine
    assert not received


def test_resume_hands_the_signal_on_too(tiny, tmp_path, interrupt):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for start in (lambda: bardling.train(tiny, tmp_path / "run", quiet=True), lambda: bardling.resume(tmp_path / "run")):
        with pytest.raises(KeyboardInterrupt):
            start()
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
