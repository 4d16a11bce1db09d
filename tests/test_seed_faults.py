"""Faults that the two older trainers have, each looked for here under its number.

A1 to A37 are nanoGPT's and B1 to B59 nano-gpt's, in the order of `docs/design-notes.md`, whose table names for every one of
them the test that shows its absence, or why it cannot occur. The tests of this file cover those that no other test shows.
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from bardling.checkpoint.export import export_nanogpt
from bardling.checkpoint.load import load
from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.data import DATA_COMMANDS
from bardling.cli.main import COMMANDS, main
from bardling.config import ModelConfig, RunConfig, SampleConfig, TrainConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import Precision, choose_precision
from bardling.errors import UserError
from bardling.generation.generate import generate
from bardling.interop.nanogpt import run_config_from_nanogpt
from bardling.interop.pretrained import is_hub_name
from bardling.interop.python_config import read_py_config
from bardling.model.gpt import GPT
from bardling.planning.batching import make_plan
from bardling.planning.schedules import followed_schedule
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.sample import Sample
from bardling.training.run import resume, train
from bardling.training.state import TrainState

PROJECT = Path(__file__).parents[1]
SOURCES = sorted((PROJECT / "src" / "bardling").rglob("*.py"))


@pytest.fixture
def tiny(tiny, change) -> RunConfig:
    return change(tiny, optim={"warmup_steps": 0}, sample={"every": 0}, model={"vocab_multiple": 64})


def records(run: Path, kind: str):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def tensors(path: Path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_fault_stands_in_the_table_and_every_test_that_it_names_exists():
    text = (PROJECT / "docs" / "design-notes.md").read_text()
    rows = re.findall(r"^\| ([AB]\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    numbers = [number for number, _, _ in rows]
    assert numbers == [*(f"A{n}" for n in range(1, 38)), *(f"B{n}" for n in range(1, 60))]
    for number, _, answer in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", answer)
        assert named or answer.startswith("Cannot occur: "), number
        for path, name in named:
            assert (PROJECT / path).is_file(), f"{number}: {path}"
            assert not name or f"def {name}(" in (PROJECT / path).read_text(), f"{number}: {path}::{name}"


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a2_a_worse_validation_loss_never_becomes_the_best(tiny, change, tmp_path):
    # A text that is learnt in a few steps and then forgotten, since the learning rate is far too high.
    config = change(tiny, optim={"lr": 0.3, "min_lr": 0.3}, train={"grad_clip": 0.0}, eval={"every": 3})
    train(config, tmp_path / "run", quiet=True)
    losses = {record["step"]: record["loss"] for record in records(tmp_path / "run", "val")}
    best = min(losses, key=losses.get)
    assert losses[30] > losses[best], "it has to get worse for this test to say anything"
    store = RunFolder(tmp_path / "run").store()
    assert store.best().name == f"step-{best:06d}"
    last = json.loads((store.path(30) / "training.json").read_text())
    assert (last["best_step"], last["best_val_loss"]) == (best, pytest.approx(losses[best]))


@pytest.mark.parametrize("every", [0, 7, 30])
def test_a3_b6_the_last_update_is_saved_and_there_is_none_too_many(tiny, change, tmp_path, every):
    train(change(tiny, checkpoint={"every": every, "save_best": False}), tmp_path / "run", quiet=True)
    folder = RunFolder(tmp_path / "run").store().latest(print)
    assert folder.name == "step-000030"
    counts = {value.item() for name, value in tensors(folder / "optimizer.safetensors").items() if name.endswith(".step")}
    assert counts == {30.0}, "AdamW's own count of the updates that are in these weights"
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 31))


def test_a14_every_logged_step_has_rate_norm_speed_and_memory(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 5}), tmp_path / "run", quiet=True)
    for record in records(tmp_path / "run", "train"):
        for key in ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "epoch", "bits_per_byte", "mfu"):
            assert record[key] > 0, key


def test_a16_b13_no_silent_number_format(tiny, change, tmp_path):
    assert choose_precision("auto", torch.device("cpu")).name in ("float32", "bfloat16")
    with pytest.raises(UserError, match="precision = 'float16': CPUs train in float32 or bfloat16"):
        train(change(tiny, precision="float16"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    # What nanoGPT's dtype means: nothing off CUDA, and then it is said.
    run = run_config_from_nanogpt({"device": "cpu", "dtype": "float16"})
    assert run.config.precision == "float32"
    assert any("only takes effect on CUDA" in note for note in run.notes)


def test_a18_b59_another_context_crops_weights_and_adam_or_is_said(tiny, change, tmp_path, capsys):
    train(change(tiny, train={"steps": 4}, model={"gelu": "erf"}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    shorter = change(tiny, train={"steps": 8}, model={"block_size": 10, "gelu": "erf"})
    result = train(shorter, tmp_path / "shorter", continue_from=str(tmp_path / "out"), quiet=True)
    assert result.step == 8
    own = tensors(RunFolder(tmp_path / "shorter").store().latest(print) / "optimizer.safetensors")
    assert own["transformer.wpe.weight.exp_avg"].shape == (10, 16)
    with pytest.raises(UserError, match=r"model\.block_size = 12: a run that has started keeps 10"):
        resume(tmp_path / "shorter", change(shorter, model={"block_size": 12}), quiet=True)
    longer = change(tiny, train={"steps": 1}, model={"block_size": 64, "init": str(tmp_path / "out")})
    train(longer, tmp_path / "longer")
    shown = " ".join(capsys.readouterr().out.split())
    assert "changed: model.block_size: 64 -> 16, as in the initial weights" in shown
    assert "changed: model.gelu: tanh -> erf, as in the initial weights" in shown


def test_a19_hyperparameters_changed_on_resume_take_effect_and_are_said(tiny, change, tmp_path, capsys):
    for name in ("one", "two"):
        train(change(tiny, train={"steps": 4}), tmp_path / name, quiet=True)
    longer = change(tiny, train={"steps": 8})
    resume(tmp_path / "one", longer, quiet=True)
    capsys.readouterr()
    resume(tmp_path / "two", change(longer, optim={"weight_decay": 50.0, "betas": (0.5, 0.6)}))
    shown = " ".join(capsys.readouterr().out.split())
    assert "changed: optim.weight_decay: 0.1 -> 50.0" in shown
    assert "changed: optim.betas" in shown
    assert load(tmp_path / "two").state["transformer.h.0.mlp.c_fc.weight"].norm() < (
        0.9 * load(tmp_path / "one").state["transformer.h.0.mlp.c_fc.weight"].norm()
    )


def test_a21_data_of_another_tokenizer_is_refused(tiny, change, corpus, tmp_path):
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    other = change(tiny, train={"steps": 1}, data={"tokenizer": "bpe:300"}, model={"init": str(tmp_path / "run")})
    with pytest.raises(UserError, match="is not the model's"):
        train(other, tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a27_characters_need_no_tiktoken_and_a_strange_one_is_named(tiny, change, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # importing it fails from here on
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    main(["sample", str(tmp_path / "run"), "--prompt", "The king", "--max_new_tokens", "3", "--seed", "1"])
    assert "character 'ß' (U+00DF) at line 1, column 5" in refused(capsys, "sample", tmp_path / "run", "--prompt", "The ß")


def test_a30_ids_that_no_text_has_are_never_drawn(tiny, change, tmp_path, capsys):
    # A vocabulary larger than the tokenizer's, as nanoGPT's 50,304 is, and a model that has learnt nothing yet.
    train(change(tiny, train={"steps": 1}, model={"vocab_size": 4000}, sample={"every": 1}), tmp_path / "run", quiet=True)
    main(["sample", str(tmp_path / "run"), "--max_new_tokens", "300", "--temperature", "5", "--seed", "1"])
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=500), seed=0)
    drawn = {step[0] for step in generate(model, [[1]], max_new_tokens=200, temperature=9.0, vocab_size=7)}
    assert drawn == set(range(7))


def test_b8_resuming_adds_to_the_log(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 10}), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    resume(tmp_path / "run", change(tiny, train={"steps": 12}), quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(before)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 13))


def test_b26_the_seed_decides_the_first_weights_and_the_order(tiny, change, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        train(change(tiny, seed=seed, train={"steps": 1}), tmp_path / name, quiet=True)
    one, same, other = ([record["loss"] for record in records(tmp_path / name, "train")] for name in ("one", "same", "other"))
    assert one == same != other


def test_b34_every_hyperparameter_is_an_option_and_no_run_is_all_warmup(tiny, change, capsys):
    config = change(tiny, train={"steps": 100}, optim={"warmup_steps": 715})
    assert followed_schedule(config.optim, config.train).warmup_steps == 99
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--help"])
    text = capsys.readouterr().out
    for option in ("lr", "min_lr", "warmup_steps", "weight_decay", "betas", "eps"):
        assert f"--optim.{option}" in text
    assert "--train.grad_clip" in text


def test_b43_the_speed_is_that_of_steps_alone(monkeypatch):
    from bardling.training.hooks import base

    now = [5.0]
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timer = StepTimer(torch.device("cpu"))
    timer.resume()
    for _ in range(3):
        now[0] += 0.01
        timer.step()
    timer.pause()
    now[0] += 0.3  # a validation
    timer.resume()
    assert timer.take() == pytest.approx(0.01)


def test_b47_figures_stand_at_the_step_of_training(tiny, change, tmp_path):
    train(change(tiny, eval={"every": 10, "windows": 3}), tmp_path / "run", quiet=True)
    assert [record["step"] for record in records(tmp_path / "run", "val")] == [10, 20, 30]


def test_b48_eval_is_shared_out_over_the_processes(tiny, change, tmp_path, bardling):
    train(change(tiny, train={"steps": 2}), tmp_path / "run", quiet=True)
    one = bardling("eval", tmp_path / "run", "--windows", "7", "--precision", "float32").stdout
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bardling", "eval"]
    command += [str(tmp_path / "run"), "--windows", "7", "--precision", "float32", "--device", "cpu"]
    two = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    for line in ("loss", "perplexity", "measured on"):
        (expected,) = re.findall(rf"^{line} .*tokens?|^{line} .*[\d.]+", one, re.MULTILINE)
        assert two.stdout.count(expected) == 1, f"{expected!r}, once: one process speaks\n{two.stdout}"


def test_b52_every_process_samples_with_the_plain_model_under_autocast(tiny, monkeypatch):
    from bardling.training.hooks import sample as sampling

    asked = []
    monkeypatch.setattr(sampling, "generate", lambda model, prompts, **options: asked.append((model, options)) or iter([[1]]))
    tokenizer = build_tokenizer("byte", [])
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=tokenizer.vocab_size))
    state = TrainState(model, torch.optim.SGD(model.parameters()), step=5)

    class Silent:
        def log(self, record):
            asked.append(record)

    for rank in (0, 1):
        precision, timer = Precision("bfloat16", "", "cpu"), StepTimer(torch.device("cpu"))
        plan, context = make_plan(TrainConfig(steps=5), 8, 1), Alone(rank, 2, torch.device("cpu"))
        hook = Sample(HookContext(Silent(), timer, plan, context, precision), SampleConfig(every=5), tokenizer)
        state.hooks_done.clear()
        hook(state, None)
    assert [entry[0] for entry in asked if isinstance(entry, tuple)] == [model, model]
    assert asked[0][1]["autocast"]().__class__ is torch.autocast


class Alone(Context):
    """A process of several whose others agree with it."""

    def any(self, flag):
        return flag


# ---- models and files -----------------------------------------------------------------------------------------------


def test_a24_b49_the_model_has_no_buffers():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=64, vocab_size=9))
    assert list(model.buffers()) == []
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_a36_b15_saved_names_are_plain_and_tied_weights_are_stored_once(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    saved = tensors(RunFolder(tmp_path / "run").store().latest(print) / "model.safetensors")
    assert all(name.startswith("transformer.") for name in saved)
    assert sum(name.endswith("wte.weight") for name in saved) == 1
    vocab = load(tmp_path / "run").config.vocab_size
    assert sum(value.shape[0] == vocab for value in saved.values()) == 1, "no head, and no second embedding"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_b12_autocast_gets_the_kind_of_device_and_not_its_number():
    assert Precision("bfloat16", "", torch.device("cuda:1").type).autocast().device == "cuda"
    assert choose_precision("float32", torch.device("cuda:1")).device_type == "cuda"


def test_b19_checkpoints_load_on_a_machine_without_their_device(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    for spec in (tmp_path / "run", tmp_path / "out"):
        loaded = load(spec, training=True)
        assert {value.device.type for value in (*loaded.state.values(), *loaded.optimizer_tensors.values())} == {"cpu"}


def test_b20_b21_hub_names_and_folders_by_any_path(tiny, change, tmp_path, monkeypatch):
    from bardling.checkpoint import load as loading

    train(change(tiny, train={"steps": 1}), tmp_path / "models" / "run", quiet=True)
    asked = []
    monkeypatch.setattr(loading, "fetch_model", lambda name: asked.append(name) or RunFolder(run).store().latest(print))
    run = tmp_path / "models" / "run"
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("user/repo")
    assert is_hub_name("gpt2-xl")
    load("user/repo")
    assert asked == ["user/repo"]
    for spec in ("models/run", "./models/run", str(run), "models/../models/run"):
        assert not is_hub_name(spec)
        load(spec)
    assert asked == ["user/repo"]


def test_b23_b46_commands_that_lack_something_say_what(tiny, change, tmp_path, capsys):
    assert "MODEL" in refused(capsys, "sample")
    assert "no recipe given" in refused(capsys, "train")
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    RunFolder(tmp_path / "run").store().latest(print).rename(tmp_path / "alone")
    assert "--data" in refused(capsys, "eval", tmp_path / "alone")


def test_b51_a_prompt_may_hold_the_name_of_a_special_token(tiny, change, tmp_path, capsys):
    train(change(tiny, train={"steps": 1}, data={"tokenizer": "byte"}), tmp_path / "run", quiet=True)
    for more in ([], ["--special"]):
        main(["sample", str(tmp_path / "run"), "--prompt", "<|endoftext|>a", "--max_new_tokens", "2", "--seed", "1", *more])
        assert capsys.readouterr().out.startswith("<|endoftext|>a")
    tokenizer = build_tokenizer("byte", [])
    assert len(tokenizer.encode("<|endoftext|>a")) == len("<|endoftext|>a")
    assert tokenizer.encode("<|endoftext|>a", allow_special=True).tolist() == [tokenizer.eot_id, ord("a")]


# ---- the source and the documents -----------------------------------------------------------------------------------


def settings(cls=RunConfig, prefix=""):
    for item in dataclasses.fields(cls):
        section = getattr(cls(), item.name)
        if dataclasses.is_dataclass(section):
            yield from settings(type(section), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


@pytest.mark.parametrize("setting", list(settings()))
def test_b4_b27_b39_no_setting_is_without_effect(setting):
    """Each is read somewhere outside the page that declares it and the tables that translate other trainers' names."""
    name = "final_lr" if setting == "optim.min_lr" else setting.rsplit(".", 1)[-1]  # the property that reads min_lr
    skipped = {"config.py", "nanogpt.py", "nano_gpt.py", "nanogpt_keys.py", "bench.py", "planning/plan.py", "plan.py"}
    for path in SOURCES:
        if path.name in skipped and path.parent.name != "train":
            continue
        if any(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(ast.parse(path.read_text()))):
            return
    pytest.fail(f"{setting} is read nowhere")


def test_a5_a6_b17_nothing_is_unpickled_or_executed_from_files():
    forbidden = re.compile(
        r"\bpickle\.(load|loads|Unpickler)\b|\bexec\(|(?<![.\w])eval\(|weights_only=False|allow_pickle=True|\b__import__\("
    )
    for path in SOURCES:
        assert not forbidden.search(path.read_text()), path
    loads = [path.name for path in SOURCES if "torch.load(" in path.read_text()]
    assert loads == ["torch_file.py"]
    assert "weights_only=True" in (PROJECT / "src" / "bardling" / "interop" / "torch_file.py").read_text()


def test_a7_a_misspelt_key_of_a_config_file_is_an_error(tmp_path):
    (tmp_path / "x.py").write_text("learning_rat = 5\n")
    with pytest.raises(UserError, match=r"x\.py:1: .*did you mean 'learning_rate'"):
        read_py_config(tmp_path / "x.py", {"learning_rate": float})


def test_b30_b53_processes_are_left_in_order_and_no_deprecated_parser_is_used():
    context = (PROJECT / "src" / "bardling" / "distributed" / "context.py").read_text()
    assert re.search(r"finally:[^#]*\n        dist\.destroy_process_group\(\)", context)
    assert not any("BooleanOptionalAction" in path.read_text() for path in SOURCES)


def test_b31_options_named_in_the_documents_exist(capsys):
    known = {}
    for command in [*COMMANDS, *(f"data {name}" for name in DATA_COMMANDS)]:
        with contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        known[command] = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    documents = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    checked = 0
    for path in documents:
        for command, rest in re.findall(r"bardling ((?:data )?\w+) ([^`\n|]*)", path.read_text()):
            if command not in known or ".py" in rest or re.search(r"--\w+=", rest):
                continue  # nanoGPT's own command lines are run in tests/cli/test_nanogpt_commands.py
            for option in re.findall(r"(?<!\S)--([\w.]+)", rest):
                assert option in known[command] | {"debug", "help"}, f"{path.name}: bardling {command} --{option}"
                checked += 1
    assert checked > 5


def test_b57_every_package_that_is_imported_is_declared():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(entry for extra in project["optional-dependencies"].values() for entry in extra)]
    declared = {re.split(r"[<>=!\[; ]", entry)[0].lower().replace("-", "_") for entry in wanted}
    for path in SOURCES:
        for extra in re.findall(r"bardling\[(\w+)\]", path.read_text()):
            assert extra in project["optional-dependencies"], f"{path.name} names the extra {extra}"
    owners = importlib.metadata.packages_distributions()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.append(node.module)
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bardling"}:
                own = {owner.lower().replace("-", "_") for owner in owners.get(name, [name])}
                assert own & declared, f"{path.name} imports {name}"
