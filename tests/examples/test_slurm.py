"""The Slurm script with fake Slurm commands: when signalled, it lets the run save and requeues the job."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"

SRUN = """#!/bin/bash
trap 'echo USR1 > "$LOGS/passed"; sleep 0.2; exit 138' USR1
echo "$@" > "$LOGS/srun.partial"; mv "$LOGS/srun.partial" "$LOGS/srun.log"
for _ in $(seq 3000); do sleep 0.1; [ -e "$LOGS/finish" ] && exit "$(cat "$LOGS/finish")"; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$LOGS/scontrol.log"; fi
"""


@pytest.fixture
def job(tmp_path):
    """Start the script as Slurm would, with `srun` and `scontrol` that record their arguments."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOGS": str(tmp_path),
        "SLURM_JOB_ID": "31",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
    }

    def start(*argv):
        process = subprocess.Popen(["bash", str(SCRIPT), *argv], env=environment, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while argv and not (tmp_path / "srun.log").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        return process

    return start


def test_on_a_signal_it_waits_for_the_run_to_save_and_requeues(job, tmp_path):
    process = job("quickstart", "runs/a b", "--train.steps", "7")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0
    assert (tmp_path / "passed").exists()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 31\n"
    asked = (tmp_path / "srun.log").read_text()
    assert "--rdzv-endpoint=node7:20031" in asked
    assert asked.strip().endswith("-m bardling train quickstart --out runs/a b --train.steps 7")
    assert "SIGUSR1" in asked, "torchrun forwards only the signals listed in --signals-to-handle"


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_is_not_requeued(job, tmp_path, status):
    process = job("quickstart", "runs/a")
    (tmp_path / "finish.partial").write_text(str(status))
    (tmp_path / "finish.partial").rename(tmp_path / "finish")
    assert process.wait(120) == status
    assert not (tmp_path / "scontrol.log").exists()


def test_without_arguments_it_prints_its_usage(job):
    assert job().wait(120) == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)
