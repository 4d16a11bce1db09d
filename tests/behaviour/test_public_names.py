"""The public names of `bardling` stay what they are, whatever is imported or used before; the examples of docstrings run."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
import types

import pytest

import bardling
from bardling.config.recipes import load_recipe

FUNCTIONS = ("fit_batches", "generate", "load_model", "load_recipe", "load_tokenizer", "prepare", "resume", "train")
CLASSES = ("GPT", "ModelConfig", "RunConfig", "UserError")

IN_A_FRESH_PROCESS = """
import importlib, sys, types

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "bardling"]:
        del sys.modules[name]

for order in (["train", "generate", "prepare"], ["generate", "prepare", "resume", "train"]):
    forget()
    bardling = importlib.import_module("bardling")
    for name in (*order, *order):
        assert isinstance(getattr(bardling, name), types.FunctionType), (order, name)
"""


def test_every_public_name_is_a_function_or_a_class():
    assert sorted((*FUNCTIONS, *CLASSES)) == bardling.__all__
    assert all(inspect.isfunction(getattr(bardling, name)) for name in FUNCTIONS)
    assert all(inspect.isclass(getattr(bardling, name)) for name in CLASSES)


def test_no_order_of_use_turns_a_name_into_a_module():
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], check=True, timeout=120)


def test_importing_every_module_leaves_the_names_alone():
    before = {name: getattr(bardling, name) for name in bardling.__all__}
    for module in pkgutil.walk_packages(bardling.__path__, "bardling."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {name: getattr(bardling, name) for name in bardling.__all__} == before
    for name in ("config", "training", "generation", "data"):
        assert isinstance(getattr(bardling, name), types.ModuleType)
    modules = {module.name.rpartition(".")[2] for module in pkgutil.iter_modules(bardling.__path__)}
    assert modules.isdisjoint(bardling.__all__)


def test_dir_lists_them_without_importing_torch():
    code = "import bardling, sys; print(*dir(bardling)); assert 'torch' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert set(bardling.__all__) <= set(listed)
    assert "__version__" in listed
    assert len(listed) == len(set(listed))


def test_a_star_import_brings_all_of_them():
    names: dict = {}
    exec("from bardling import *", names)
    assert all(names[name] is getattr(bardling, name) for name in bardling.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bardling' has no attribute 'trian'"):
        _ = bardling.trian


def test_the_example_of_the_package_runs(tiny, change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_recipe("quickstart"), bardling.RunConfig)
    monkeypatch.setattr(bardling, "load_recipe", lambda name: change(tiny, data={"tokenizer": "byte"}))
    example = [line for line in bardling.__doc__.splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(example)), {})
    assert (tmp_path / "runs" / "first" / "config.toml").is_file()
    assert len(capsys.readouterr().out.splitlines()[-1]) > 0
