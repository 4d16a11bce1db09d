"""One of two processes is killed or stopped: one line names it, torchrun restarts both, and no step is lost."""

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bardling.errors import UserError
from bardling.training.run import train

STEPS = 200  # the signal goes out at the tenth: a second or more are left for who sends it
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ranks.py"


@pytest.fixture(scope="module")
def ranks():
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe(ranks, corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "recipe.toml"
    path.write_text(ranks.RECIPE.format(text=corpus, steps=STEPS, timeout=10, layout="ddp"))
    return path


@pytest.fixture(scope="module")
def calm(ranks, recipe):
    out = recipe.parent / "calm"
    log = recipe.parent / "calm.log"
    assert ranks.launch(recipe, out, 0, log).wait() == 0, log.read_text()
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_with_restarts_the_run_gives_the_same_result(ranks, recipe, calm, tmp_path, number):
    outcome = ranks.disturbed(recipe, tmp_path / "run", number=number, rank=1, lines=9, restarts=2)
    assert outcome.status == 0, outcome.output
    assert ranks.losses(tmp_path / "run") == ranks.losses(calm)
    weights = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (calm / weights).read_bytes()
    assert len(re.findall(r"^bardling: rank 1 \(.*last in: ", outcome.output, re.MULTILINE)) == 1, outcome.output
    assert outcome.seconds < 60


def test_without_restarts_the_job_ends_at_once(ranks, recipe, tmp_path):
    outcome = ranks.disturbed(recipe, tmp_path / "run", number=signal.SIGKILL, rank=0, lines=9, restarts=0)
    assert outcome.status == 1
    assert re.search(r"^bardling: rank 0 \(.*last in: ", outcome.output, re.MULTILINE), outcome.output
    assert "[rank1]: Traceback" not in outcome.output


@pytest.mark.parametrize(
    ("first", "again", "goes_on"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, True),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b"}, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, True),  # of the same agent
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {}, False),
    ],
)
def test_only_the_job_that_started_a_run_continues_it(tiny, change, tmp_path, monkeypatch, first, again, goes_on):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    tiny = change(tiny, train={"steps": 6})
    train(tiny, tmp_path / "run", quiet=True)
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    if goes_on:
        train(tiny, tmp_path / "run", quiet=True)
        with pytest.raises(UserError, match="already contains a run"):
            train(change(tiny, train={"steps": 7}), tmp_path / "run", quiet=True)
    else:
        with pytest.raises(UserError, match="already contains a run"):
            train(tiny, tmp_path / "run", quiet=True)


@pytest.mark.slow
def test_twenty_times(ranks):
    done = subprocess.run([sys.executable, str(SCRIPT), "--trials", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("20 of 20\n")
