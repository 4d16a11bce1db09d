"""Signals: SIGUSR1 works like SIGTERM, all processes exit with one status, and data preparation stops too."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bardling.config.recipes import config_to_toml
from bardling.data.tokens.journal import work_folder
from bardling.training.run import resume, train

TOKENISES_FOR_MINUTES = """
import sys, time
from bardling.data.tokens import journal
from bardling.data.tokens import prepare
from bardling.cli.main import main
journal.EVERY = 0.0
prepare._BATCH = prepare._BATCH_OF_WORKER = 10_000
write = journal.Journal.write
def slower(*args):
    write(*args)
    time.sleep(0.5)
journal.Journal.write = slower
main(sys.argv[1:])
"""


def start(*argv, torchrun="", code=None):
    """Start the command; `torchrun`: in two processes, by an agent protected by nohup, which handles these signals."""
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--signals-to-handle={torchrun}"]
    module = ["-m", "bardling"] if code is None else ["-c", code]
    command = [*(["nohup"] if torchrun else []), sys.executable, *(agent if torchrun else []), *module, *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(process, condition):
    end = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.002)


def logged(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_the_run_is_saved_and_the_exit_status_names_the_signal(tiny, change, tmp_path, number, status, monkeypatch):
    from bardling.training import step as module

    original, calls = module.set_learning_rate, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), number)
        return original(*arguments)

    config = change(tiny, train={"micro_batch": 2})
    train(config, tmp_path / "calm", quiet=True)
    monkeypatch.setattr(module, "set_learning_rate", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        train(config, tmp_path / "run", quiet=True)
    assert stop.type is KeyboardInterrupt if status == 130 else stop.value.code == status
    assert logged(tmp_path / "run") == 8, "the running pass was the last of its step"
    resume(tmp_path / "run", quiet=True)
    weights = "checkpoints/step-000030/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "calm" / weights).read_bytes()


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_torchrun_passes_it_on(tiny, change, tmp_path):
    config = change(tiny, train={"steps": 2000, "micro_batch": 1}, eval={"every": 0}, sample={"every": 0})
    (tmp_path / "long.toml").write_text(config_to_toml(config))
    process = start("train", tmp_path / "long.toml", "--out", tmp_path / "run", torchrun="SIGTERM,SIGINT,SIGUSR1")
    wait_until(process, lambda: logged(tmp_path / "run") >= 5)
    process.send_signal(signal.SIGHUP)  # which the agent leaves ignored, and so do its processes
    before = logged(tmp_path / "run")
    wait_until(process, lambda: logged(tmp_path / "run") >= before + 5)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped at step" in output, output
    assert "SIGHUP" not in output
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps[-1] == f"step-{logged(tmp_path / 'run'):06d}", "the last logged step is saved"


def test_a_hangup_that_torchrun_handles_saves_even_with_nohup(tiny, change, tmp_path):
    config = change(tiny, train={"steps": 2000, "micro_batch": 1}, eval={"every": 0}, sample={"every": 0})
    (tmp_path / "long.toml").write_text(config_to_toml(config))
    process = start("train", tmp_path / "long.toml", "--out", tmp_path / "run", torchrun="SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    wait_until(process, lambda: logged(tmp_path / "run") >= 5)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "SIGHUP received: saving and stopping" in output, output
    steps = logged(tmp_path / "run")
    assert f"stopped at step {steps} and saved" in output, output
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_sigterm_during_tokenisation_ends_quickly_and_the_same_command_continues(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a long text, with some words in it.\n" for number in range(60_000)))
    command = ("prepare", text, "--out", tmp_path / "data", "--tokenizer", "bpe:300", "--workers", "2")
    process = start(*command, code=TOKENISES_FOR_MINUTES)
    wait_until(process, lambda: (work_folder(tmp_path / "data") / "journal.json").exists())
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert time.monotonic() - begin < 60
    assert "bardling: interrupted" in output
    assert "Traceback" not in output
    assert not (tmp_path / "data").exists()
    process = start(*command)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def test_sigterm_before_the_first_step_ends_with_its_status(tiny, tmp_path):
    (tmp_path / "tiny.toml").write_text(config_to_toml(tiny))
    code = "\n".join(
        [
            "import os, signal, sys",
            "import bardling.data.tokens.dataset as dataset",
            "dataset.open_data = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)",
            "from bardling.cli.main import main",
            "main(sys.argv[1:])",
        ]
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr.strip()) == (143, "bardling: interrupted")
    assert not (tmp_path / "run").exists()
