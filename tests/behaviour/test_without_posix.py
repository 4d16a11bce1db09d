"""Without `fcntl`, `resource` and the signals of POSIX, as on Windows: runs are trained and resumed, text is prepared."""

import os
import subprocess
import sys

import pytest

from bardling.config.recipes import config_to_toml

HIDDEN = """
import os, signal, sys
for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "O_NOFOLLOW", "fork", "getuid", "geteuid", "killpg"):
    delattr(os, name)
from bardling.cli.main import main
for command in os.environ["COMMANDS"].split(";"):
    try:
        main(command.split())
    except SystemExit as end:
        assert not end.code, command
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")

    def run(recipe: str, *commands: str) -> str:
        (folder / "tiny.toml").write_text(recipe)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COMMANDS": ";".join(commands)}
        command = [sys.executable, "-c", HIDDEN]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


def test_train_resume_and_prepare(program, tiny, corpus):
    shown = program(
        config_to_toml(tiny),
        "train tiny.toml --out run",
        "resume run --train.steps 32",
        f"prepare {corpus} --out data --tokenizer bpe:300 --workers 2",
        "eval run",
        "info run --verify",
        "info data --verify",
    )
    assert "32/32" in shown
    assert shown.count("all checksums match") == 2
    assert "cannot lock (this system has no file locks); continuing unlocked" in shown
    assert "MB" not in next(line for line in shown.splitlines() if "step 32/32" in line and "loss" in line)
