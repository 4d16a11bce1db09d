"""Without a working compiler, `compile = "auto"` continues eagerly and says why; what has to compile is refused in one line."""

import dataclasses
import sys

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.exc import CppCompileError, InductorError, TritonMissing

from bardling.cli.main import main
from bardling.config import TrainConfig
from bardling.config.recipes import config_to_toml
from bardling.distributed.context import SINGLE
from bardling.distributed.device import compiler_problem, remove_damaged_code
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.training import facts, resolve
from bardling.training.compile_choice import without_compiler
from bardling.training.run import train

CPU = torch.device("cpu")


def failing(error):
    def compiled(*arguments):
        raise error

    return lambda function, **options: compiled


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(facts, "compiler_problem", lambda device: "there is no C++ compiler (install g++)")


def test_pytorch_finds_no_compiler(monkeypatch):
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        monkeypatch.setenv("CXX", "/no/such/compiler")
        problem = compiler_problem(CPU)
        assert problem == "CXX = '/no/such/compiler' is not a working compiler (install g++ or clang++, or set CXX)"
        monkeypatch.delenv("CXX")
        assert compiler_problem(CPU) == "there is no C++ compiler (install g++ or clang++, or set CXX)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            CppCompileError(["g++", "x.cpp"], "In file included\nx.cpp:1: fatal error: omp.h: No such file\n"),
            "fatal error: omp.h",
        ),
        (CppCompileError(["g++"], "x" * 5000), "the compiler fails: xxx"),
        (TritonMissing(None), "no working Triton"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "Failed to find C compiler"),
        (RuntimeError("torch.compile is not supported on Python 3.99"), "not supported on Python 3.99"),
        (
            RuntimeError("In a subprocess:\nTraceback:\n  raise RuntimeError(\nRuntimeError: no C compiler"),
            "RuntimeError: no C compiler",
        ),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_every_failure_gets_a_short_reason(monkeypatch, error, expected):
    monkeypatch.setattr(torch, "compile", failing(error))
    problem = compiler_problem(CPU)
    assert expected in problem
    assert "\n" not in problem
    assert len(problem) < 160


def test_an_interruption_is_no_failure_of_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        compiler_problem(CPU)


def test_auto_trains_eagerly_and_says_why(tiny, tmp_path, monkeypatch, no_compiler, capsys):
    monkeypatch.setattr(resolve, "choose_compile", lambda *arguments, **options: (True, "worth it"))
    train(dataclasses.replace(tiny, compile="auto"), tmp_path / "run")
    assert "compile off (there is no C++ compiler (install g++))" in " ".join(capsys.readouterr().out.split())
    assert 'compile = "off"' in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize("command", ["train", "bench"])
def test_on_is_refused_in_one_line_and_nothing_is_written(tiny, tmp_path, command, no_compiler, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_to_toml(dataclasses.replace(tiny, compile="on")))
    with pytest.raises(SystemExit) as end:
        main([command, str(recipe), *(["--out", str(tmp_path / "run")] if command == "train" else [])])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "compile = 'on': torch.compile does not work here, because there is no C++ compiler" in lines[0]
    assert "--compile off" in lines[0]
    assert not (tmp_path / "run").exists()


def test_cuda_graphs_need_compilation_even_if_it_is_auto():
    with pytest.raises(UserError, match=r"cuda_graphs = True: .* no Triton; use --compile off and --cuda_graphs false"):
        without_compiler("there is no Triton", "auto", True)


def test_a_run_that_does_not_compile_needs_no_compiler(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "compiler_problem", lambda device: sys.exit("compiled"))
    for setting in ("off", "auto"):
        config = dataclasses.replace(tiny, compile=setting, train=TrainConfig(steps=1, batch_size=2))
        train(config, tmp_path / setting, quiet=True)


def test_processes_decide_alike(tmp_path, monkeypatch):
    class Elsewhere(type(SINGLE)):
        def any(self, flag):
            return True

    context = Elsewhere(0, 2, CPU)
    monkeypatch.setattr(facts, "compiler_problem", lambda device: None)
    found = facts.Facts(context, None).compiler_problem(CPU, compiles=True)
    assert found == "it fails in another process"


@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_code_that_a_killed_compilation_has_damaged_is_removed(tiny, tmp_path, monkeypatch, kind):
    """A process that dies while the linker writes leaves a library that no later run can load."""
    library = tmp_path / "code.main.so"
    library.write_bytes(b"\x7fELF")

    def pass_forward(*arguments, **options):
        raise InductorError(kind(f"{library}: file too short"), sys._getframe())

    monkeypatch.setattr(GPT, "forward", pass_forward)
    with pytest.raises(
        UserError, match=r"code.main.so: was damaged when a compilation was killed, and is removed: start again"
    ):
        train(tiny, tmp_path / "run", quiet=True)
    assert not library.exists()


def test_code_that_fails_for_another_reason_is_kept(tmp_path):
    library = tmp_path / "code.main.so"
    library.touch()
    error = InductorError(ImportError(f"{library}: undefined symbol: omp_get_wtime"), sys._getframe())
    assert remove_damaged_code(error) is None
    assert library.exists()
