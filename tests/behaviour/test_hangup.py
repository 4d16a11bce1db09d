"""A closed terminal, Ctrl-C and SIGTERM: acknowledged at once, in any phase of a run, and nothing is lost."""

import os
import pty
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bardling.cli import main as main_module
from bardling.config.recipes import config_to_toml
from bardling.errors import Terminated
from bardling.training import loop
from bardling.training import step as step_module
from bardling.training.facts import Facts
from bardling.training.recovery.signals import StopOnSignal
from bardling.training.run import resume, train

WEIGHTS = "checkpoints/step-000030/model.safetensors"


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(7, action)`: do something at the start of a step."""

    def register(step, action):
        seed = loop.seed_dropout

        def act(*arguments):
            if arguments[1] == step:
                action()
            seed(*arguments)

        monkeypatch.setattr(loop, "seed_dropout", act)

    return register


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def stopped(config, run, *, quiet=True):
    """Exit status and latest step of a run that a signal stops."""
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        train(config, run, quiet=quiet)
    status = 130 if caught.type is KeyboardInterrupt else caught.value.code
    return status, max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_a_hangup_saves_and_the_resumed_run_ends_as_if_undisturbed(tiny, tmp_path, at_step, monkeypatch, capsys):
    train(tiny, tmp_path / "calm", quiet=True)
    with monkeypatch.context():
        at_step(7, lambda: send(signal.SIGHUP))
        assert stopped(tiny, tmp_path / "run", quiet=False) == (129, 7)
    monkeypatch.undo()
    assert "SIGHUP received: saving and stopping" in capsys.readouterr().out
    resume(tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "calm" / WEIGHTS).read_bytes()


def test_a_hangup_that_nohup_ignores_stays_ignored(tiny, tmp_path, at_step):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(7, lambda: send(signal.SIGHUP))
        train(tiny, tmp_path / "run", quiet=True)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "numbers", [("SIGHUP", "SIGHUP"), ("SIGTERM", "SIGHUP"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM")]
)
def test_signals_that_arrive_together_are_one_request(tiny, tmp_path, at_step, numbers):
    """A shell passes a hangup on that its jobs also get from the kernel; systemd sends two signals, and so do launchers."""
    first, second = (getattr(signal, name) for name in numbers)
    at_step(7, lambda: send(first, second))
    assert stopped(tiny, tmp_path / "run") == (128 + first, 7)


def test_a_later_second_signal_exits_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopOnSignal() as signals:
        signals.begin(lambda text: None)
        send(signal.SIGTERM)
        signals._received -= 5.0
        send(signal.SIGINT)
    assert left == [130]


def test_a_signal_before_training_begins_leaves_at_once():
    with StopOnSignal() as signals:
        with pytest.raises(Terminated) as error:
            send(signal.SIGTERM)
        assert (error.value.status, signals.signal) == (143, None)


@pytest.mark.parametrize(("later", "left"), [(0.5, []), (5.0, [130])])
def test_before_training_too_signals_that_arrive_together_are_one_request(monkeypatch, later, left):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with StopOnSignal() as signals:
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        signals._received -= later
        send(signal.SIGINT)  # while it cleans up
    assert exits == left


def test_a_command_that_is_stopped_twice_at_once_cleans_up(monkeypatch, capsys):
    """Not within an import, where a signal is postponed."""
    cleaned = []

    def command(arguments):
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            cleaned.append(True)

    monkeypatch.setattr(main_module.importlib, "import_module", lambda name: SimpleNamespace(run=command))
    with pytest.raises(SystemExit) as end:
        main_module.main(["plan"])
    assert (end.value.code, cleaned) == (143, [True])
    assert capsys.readouterr().err == "bardling: interrupted\n"


def test_a_stopped_program_does_not_wait_for_what_libraries_do_at_exit(tiny, tmp_path):
    """PyTorch's compiler waits there for its processes."""
    (tmp_path / "recipe.toml").write_text(config_to_toml(tiny))
    code = (
        "import atexit, os, signal\n"
        "from bardling.training import loop\n"
        "atexit.register(print, 'at exit')\n"
        "seed = loop.seed_dropout\n"
        "loop.seed_dropout = lambda *a: (a[1] == 7 and os.kill(os.getpid(), signal.SIGTERM), seed(*a))\n"
        "from bardling.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 143, done.stderr
    assert "stopped at step 7 and saved" in done.stdout
    assert "at exit" not in done.stdout


class SlowCompiler:
    """Replaces `torch.compile`: the first pass takes a minute."""

    def __init__(self, number):
        self.number = number

    def __call__(self, body, **options):
        def compile_first(*arguments, **named):
            os.kill(os.getpid(), self.number)
            time.sleep(60)
            raise AssertionError("the signal does not interrupt the compilation")

        return compile_first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_compilation(tiny, change, tmp_path, monkeypatch, capsys, number):
    import torch

    with monkeypatch.context() as patch:
        patch.setattr(Facts, "compiler_problem", lambda *_, **__: None)  # it compiles too
        patch.setattr(torch, "compile", SlowCompiler(number))
        begin = time.monotonic()
        assert stopped(change(tiny, compile="on"), tmp_path / "run", quiet=False) == (128 + number, 0)
    assert time.monotonic() - begin < 30
    lines = capsys.readouterr().out
    assert lines.index("compiling the model") < lines.index(f"{number.name} received")


def test_a_signal_does_not_interrupt_the_update(tiny, change, tmp_path, monkeypatch):
    original, calls = step_module._update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            send(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(step_module, "_update", interrupted)
    import torch

    monkeypatch.setattr(torch, "compile", lambda body, **options: body)
    assert stopped(change(tiny, compile="on"), tmp_path / "run") == (143, 4)


def test_a_terminal_that_is_closed_hangs_up_and_the_run_is_saved(tiny, change, tmp_path):
    (tmp_path / "long.toml").write_text(config_to_toml(change(tiny, train={"steps": 100_000})))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "bardling", "train", "long.toml", "--out", "run"])
    shown = b""
    while b"loss" not in shown:
        shown += os.read(terminal, 65536)
    begin = time.monotonic()
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert time.monotonic() - begin < 30
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count('"train"')
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_nohup_protects_a_run_in_a_closed_terminal(tmp_path):
    """Before training, too: the program leaves an ignored SIGHUP ignored."""
    code = (
        "import os, signal, sys\n"
        "from bardling.cli import main\n"
        "main.importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGHUP) or sys\n"
        "sys.run = lambda argv: print('unharmed')\n"
        "main.main(['plan'])\n"
    )
    for ignored, status in (("trap '' HUP; ", 0), ("", 129)):
        command = ["bash", "-c", f'{ignored}exec "$@"', "bash", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, "unharmed" in done.stdout) == (status, not status), done.stderr
