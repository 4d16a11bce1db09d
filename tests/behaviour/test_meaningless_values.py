"""Values without a meaning and paths that do not exist: one line that names the option and the value, and nothing is done."""

import dataclasses

import pytest

from bardling.checkpoint import load as loading
from bardling.cli.main import main
from bardling.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.errors import UserError
from bardling.interop.pretrained import is_hub_name
from bardling.training.run import train


def refused(capsys, *argv):
    """The message of a command that must be refused in one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    return error


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A folder with a finished run `runs/first`."""
    folder, sizes = tmp_path_factory.mktemp("place"), {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    config = RunConfig(device="cpu", precision="float32", compile="off", model=ModelConfig(**sizes))
    config = dataclasses.replace(config, data=DataConfig(source=str(corpus)), optim=OptimConfig(warmup_steps=0))
    train(dataclasses.replace(config, train=TrainConfig(steps=1, batch_size=1)), folder / "runs" / "first", quiet=True)
    return folder


@pytest.fixture
def runs(place, monkeypatch):
    """The current folder is `place`, and no model may be looked for on the hub."""
    monkeypatch.setattr(loading, "fetch_model", lambda *args, **options: pytest.fail("the hub is asked"))
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("eval", "windows", "0"),
        ("eval", "windows", "-3"),
        ("eval", "batch_size", "0"),
        ("eval", "batch_size", "-1"),
        ("eval", "task_items", "0"),
        ("eval", "task_items", "-5"),
        ("sample", "num_samples", "0"),
        ("sample", "max_new_tokens", "-1"),
        ("sample", "top_k", "0"),
        ("sample", "top_p", "nan"),
        ("sample", "temperature", "inf"),
        ("info", "step", "-1"),
        ("info", "step", "99999999999999999999"),
        ("verify", "seconds", "0"),
        ("verify", "seconds", "-1"),
        ("verify", "seconds", "inf"),
        ("verify", "seconds", "nan"),
        ("bench", "steps", "0"),
        ("bench", "warmup", "-1"),
        ("plan", "gpus", "0"),
        ("plan", "mfu", "nan"),
        ("plan", "memory_gb", "inf"),
    ],
)
def test_a_value_without_a_meaning_is_refused(runs, capsys, command, option, value):
    before = sorted(runs.rglob("*"))
    subject = "quickstart" if command in ("verify", "bench", "plan") else "runs/first"
    error = refused(capsys, command, subject, f"--{option}", value)
    assert option in error
    assert value in error
    assert sorted(runs.rglob("*")) == before


COMMANDS = (["eval"], ["sample"], ["export", "--out", "x"], ["report"], ["resume"], ["info"], ["eval", "--tasks", "hellaswag"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", ["runs/frist", "./runs/First", "runs/first_"])
def test_a_mistyped_run_is_no_model_on_the_hub(runs, capsys, command, name):
    error = refused(capsys, command[0], name, *command[1:])
    assert error.startswith(f"bardling: {name.removeprefix('./')}: no such f")
    assert "(did you mean 'first'?)" in error
    assert not (runs / "x").exists()


def test_a_mistyped_folder_of_runs_is_no_user_on_the_hub(runs, capsys):
    for command in ("eval", "sample"):
        assert "run/first: no such folder: the folder run does not exist; existing runs: runs/first" in refused(
            capsys, command, "run/first"
        )
    assert "runs/frist: no such folder (did you mean 'first'?)" in refused(
        capsys, "train", "quickstart", "--model.init", "runs/frist"
    )


def test_models_on_the_hub_keep_their_names(runs, capsys):
    (runs / "models").mkdir(exist_ok=True)
    for name in ("gpt2", "user/repo", "openai-community/first", "meta/runs"):
        assert is_hub_name(name)
    assert not is_hub_name("models/anything")
    with pytest.raises(UserError, match="not looked for on the hub, because there is a folder models here"):
        loading.load("models/anything")


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_text_of_no_or_one_token_gets_a_remedy_that_fits(runs, capsys, tokens):
    (runs / "short.txt").write_text("k" * tokens)
    error = refused(capsys, "eval", "runs/first", "--data", "short.txt")
    assert "val_fraction" not in error
    assert ("is empty: choose a source that contains text" if tokens == 0 else "use a longer text") in error
    error = refused(capsys, "train", "quickstart", "--data.source", "short.txt", "--data.tokenizer", "byte", "--out", "new")
    assert "lower model.block_size" not in error
    assert not (runs / "new").exists()
