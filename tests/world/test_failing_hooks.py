"""What a run encodes is checked before it starts, and nothing that goes wrong in a sample, task or sink ends it."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.config import DataConfig
from bardling.errors import JobLost, UserError
from bardling.evaluate import benchmarks as measuring
from bardling.extensions import SINKS
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink, read_jsonl
from bardling.training import texts
from bardling.training.hooks import sample as sampling
from bardling.training.run import resume, train

ITEM = '{{"ctx": "The king", "endings": [" met", " {}"], "label": 0, "ind": "{}"}}\n'


def task_file(folder: Path, *endings: str, name: str = "quiz.jsonl") -> str:
    path = folder / name
    path.write_text("".join(ITEM.format(ending, f"n{number}") for number, ending in enumerate(endings)), encoding="utf-8")
    return str(path)


@pytest.fixture
def short(tiny, change):
    """Ten steps with samples and validation."""
    tiny = change(tiny, train={"steps": 10}, optim={"warmup_steps": 1})
    return change(tiny, eval={"every": 5}, sample={"every": 2}, checkpoint={"every": 5})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(run).state


def same(run: Path, other: Path) -> bool:
    one, two = weights(run), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- before the first step ----


@pytest.mark.parametrize("prompt", ["Müll", "{", "The king\tmet", "北京", "🙂", "x\r\n", "\0", "<|endoftext|>", "A"])
def test_a_prompt_with_an_unknown_character_is_refused_before_anything_is_written(short, change, tmp_path, prompt):
    with pytest.raises(UserError) as error:
        train(change(short, sample={"prompt": prompt}), tmp_path / "run", quiet=True)
    assert str(error.value).startswith(f"sample.prompt = {prompt!r}: character ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", ["Müll", "{", "北京", "left"])
def test_a_task_with_an_unknown_character_is_refused_by_its_item(short, change, tmp_path, ending):
    tasks = (task_file(tmp_path, "rose", "met", ending, "rose"),)
    with pytest.raises(UserError, match=r"quiz, item n2: character ") as error:
        train(change(short, eval={"tasks": tasks}), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_tasks_of_the_same_name_are_refused(short, change, tmp_path):
    (tmp_path / "other").mkdir()
    tasks = (task_file(tmp_path, "rose"), task_file(tmp_path / "other", "rose"))
    with pytest.raises(UserError, match="both called 'quiz'"):
        train(change(short, eval={"tasks": tasks}), tmp_path / "run", quiet=True)


def test_samples_that_are_disabled_are_not_checked(short, change, tmp_path):
    train(change(short, sample={"prompt": "Müll", "every": 0}), tmp_path / "run", quiet=True)


def test_bytes_can_encode_every_prompt_and_task(short, change, tmp_path):
    tasks = (task_file(tmp_path, "Müll"),)
    config = change(short, data={"tokenizer": "byte"}, sample={"prompt": "北京"}, eval={"tasks": tasks})
    train(config, tmp_path / "run", quiet=True)
    kinds = [record["kind"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert kinds.count("task") == 2


def test_a_text_without_line_breaks_starts_its_samples_with_its_first_character(short, change, tmp_path):
    (tmp_path / "line.txt").write_text("one long line of words " * 400)
    config = change(short, data=dataclasses.asdict(DataConfig(source=str(tmp_path / "line.txt"), tokenizer="char")))
    train(config, tmp_path / "run", quiet=True)
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {record["prompt"] for record in samples} == {"o"}


# ---- resuming runs that were started with a bad prompt or task ----


def test_a_run_with_a_bad_prompt_resumes_without_samples(short, change, tmp_path, capsys, monkeypatch):
    """Earlier versions did not check the prompt."""
    bad = change(short, sample={"prompt": "Müll"})
    with monkeypatch.context() as patch:
        patch.setattr(texts, "_check_prompt", lambda *_: None)
        train(bad, tmp_path / "run", quiet=True)
    capsys.readouterr()
    resume(tmp_path / "run", change(bad, train={"steps": 14}), quiet=True)
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1
    assert "sample.prompt = 'Müll': character 'M'" in warned
    assert "continues without samples" in warned


def test_a_new_bad_prompt_of_a_resumed_run_is_refused(short, change, tmp_path):
    train(short, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"sample\.prompt = 'Müll'"):
        resume(tmp_path / "run", change(short, sample={"prompt": "Müll"}, train={"steps": 14}), quiet=True)
    resume(tmp_path / "run", change(short, train={"steps": 14}), quiet=True)


@pytest.mark.parametrize("damage", ["missing", "unknown", "malformed"])
def test_a_run_whose_task_is_damaged_resumes_without_it(short, change, tmp_path, capsys, damage):
    tasks = (task_file(tmp_path, "rose"), task_file(tmp_path, "met", name="other.jsonl"))
    config = change(short, eval={"tasks": tasks})
    train(config, tmp_path / "run", quiet=True)
    if damage == "missing":
        Path(tasks[0]).unlink()
    elif damage == "unknown":
        task_file(tmp_path, "Müll")
    else:
        Path(tasks[0]).write_text("{")
    resume(tmp_path / "run", change(config, train={"steps": 14}), quiet=True)
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1
    assert "quiz" in warned
    late = [
        record["task"]
        for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if record.get("step", 0) > 10 and "task" in record
    ]
    assert late == ["other"]


# ---- failures in the middle of a run ----


class PanicException(BaseException):
    """As raised by libraries written in Rust."""


FAILURES = [
    UserError("the model's logits are NaN or infinite"),
    RuntimeError("CUDA out of memory"),
    MemoryError(),
    KeyError("x"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    OSError(errno.EIO, "Input/output error"),
    AssertionError(),
    StopIteration(),
    PanicException("index out of bounds"),
]


@pytest.fixture
def failing(monkeypatch):
    """`failing(module, name, error)`: the function raises the error, and counts its calls."""

    def make(module, name, error):
        calls = []

        def fail(*_, **__):
            calls.append(name)
            raise error

        monkeypatch.setattr(module, name, fail)
        return calls

    return make


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failing_sample_is_reported_once_and_changes_nothing(short, change, tmp_path, failing, capsys, error):
    train(change(short, sample={"every": 0}), tmp_path / "plain", quiet=True)
    calls = failing(sampling, "generate", error)
    train(short, tmp_path / "run", quiet=True)
    assert len(calls) == 5
    warned = capsys.readouterr().err
    assert warned.count("warning") == warned.count("\n") == 1
    assert "sample after step 2 failed" in warned
    assert same(tmp_path / "run", tmp_path / "plain")
    assert resume(tmp_path / "run", change(short, train={"steps": 12}), quiet=True).step == 12


@pytest.mark.parametrize("error", FAILURES[:3], ids=lambda error: type(error).__name__)
def test_a_failing_task_is_reported_once_and_changes_nothing(short, change, tmp_path, failing, capsys, error):
    train(short, tmp_path / "plain", quiet=True)
    config = change(short, eval={"tasks": (task_file(tmp_path, "rose"),)})
    calls = failing(measuring, "evaluate_choices", error)
    train(config, tmp_path / "run", quiet=True)
    assert len(calls) == 2
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1
    assert "tasks after step 5 failed" in warned
    assert same(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), JobLost("rank 1 died")], ids=lambda error: type(error).__name__
)
def test_a_request_to_end_is_no_failure(short, tmp_path, failing, error):
    failing(sampling, "generate", error)
    with pytest.raises(type(error)):
        train(short, tmp_path / "run", quiet=True)


def test_a_failing_step_still_ends_the_run(short, tmp_path, monkeypatch):
    from bardling.training import loop

    def fail(*_, **__):
        raise UserError("a fault of the step")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(UserError, match="a fault of the step"):
        train(short, tmp_path / "run", quiet=True)


# ---- sinks ----


class Broken:
    """A sink that fails in one of its methods."""

    method = "log"

    def __init__(self, run):
        if self.method == "__init__":
            raise RuntimeError("no server")

    def __getattr__(self, name):
        def call(*_):
            if name == Broken.method:
                raise RuntimeError("no server")

        return call


@pytest.mark.parametrize("method", ["__init__", "log", "sample", "flush", "close"])
def test_a_failing_sink_is_reported_once(short, change, tmp_path, monkeypatch, capsys, method):
    monkeypatch.setattr(Broken, "method", method)
    monkeypatch.setitem(SINKS._registered, "broken", Broken)
    config = change(short, monitor={"sinks": ("broken",)})
    train(config, tmp_path / "run")
    assert resume(tmp_path / "run", change(config, train={"steps": 12})).step == 12
    assert capsys.readouterr().out.count("the sink 'broken' failed") in (1, 2)  # once for each start


@pytest.mark.parametrize("method", ["log", "sample", "note", "progress", "close"])
def test_a_terminal_that_goes_away_does_not_end_the_run(short, tmp_path, monkeypatch, capsys, method):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    train(short, tmp_path / "plain", quiet=True)
    monkeypatch.setattr(Console, method, fail)
    train(short, tmp_path / "run")
    assert capsys.readouterr().err.count("warning") <= 1
    assert same(tmp_path / "run", tmp_path / "plain")


def test_lines_that_the_file_refuses_are_written_later(short, tmp_path, monkeypatch, capsys):
    real, refused = JsonlSink._write, []

    def write(self):
        if len(refused) < 3 and b'"kind": "train"' in self._pending:
            refused.append(self._pending)
            raise OSError(errno.EIO, "Input/output error")
        real(self)

    monkeypatch.setattr(JsonlSink, "_write", write)
    train(short, tmp_path / "run", quiet=True)
    assert len(refused) == 3
    assert capsys.readouterr().err.count("metrics.jsonl failed") == 1
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 11))


def test_a_resumed_run_does_not_need_its_services(short, change, tmp_path, monkeypatch, capsys):
    import importlib.util

    pytest.importorskip("tensorboard")
    config = change(short, monitor={"tensorboard": True})
    train(config, tmp_path / "run", quiet=True)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else found(name, *more))
    assert resume(tmp_path / "run", change(config, train={"steps": 12})).step == 12
    assert "TensorBoard failed" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs the package tensorboard"):
        train(config, tmp_path / "new", quiet=True)


# ---- several processes ----

PROCESSES = """
import os, sys
from bardling.config.recipes import load_recipe
from bardling.evaluate import benchmarks
from bardling.training.hooks import sample
from bardling.training.run import train

rank, folder = int(os.environ["RANK"]), sys.argv[1]
real, record, evaluate, calls = sample.generate, sample.SampleRecord, benchmarks.evaluate_choices, []

def fail(*arguments, **options):
    raise RuntimeError(f"only rank {rank}")

def generate(*arguments, **options):
    calls.append(len(calls) + 1)
    sample.SampleRecord = fail if rank == 0 and calls[-1] == 3 else record  # after all that the processes do together
    if rank == 1 and calls[-1] == 1:  # before anything that they do together
        fail()
    return broken(*arguments, **options) if rank == 1 and calls[-1] == 2 else real(*arguments, **options)

def broken(*arguments, **options):
    for number, step in enumerate(real(*arguments, **options)):
        if number == 3:
            fail()
        yield step

sample.generate = generate
benchmarks.evaluate_choices = lambda *rest, **options: fail() if rank == 1 and len(calls) < 5 else evaluate(*rest, **options)
train(load_recipe(folder + "/recipe.toml"), folder + "/run", quiet=True)
"""


def test_a_failure_in_one_process_does_not_leave_the_others_waiting(short, change, tmp_path):
    from bardling.config.recipes import config_to_toml

    tasks = (task_file(tmp_path, "rose", "met"),)
    config = change(short, train={"steps": 5}, sample={"every": 1}, eval={"every": 2, "tasks": tasks})
    (tmp_path / "recipe.toml").write_text(config_to_toml(config))
    (tmp_path / "script.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "script.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, step in (("sample", 1), ("tasks", 2)):  # from each process once, however often it fails
        warning = f"bardling: warning: {name} after step {step} failed; training continues without it:"
        assert done.stderr.count(f"{warning} only rank 1") == 1
        assert done.stderr.count(f"{warning} another process failed") == 1
    assert done.stderr.count("warning: sample") == 2
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "samples.jsonl")] == [4, 5]
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "task"] == [5]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5]
