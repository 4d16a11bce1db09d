"""`model.init`: the model's own tokenizer, its maximum context, and a warning about learning rates for random weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_hf
from bardling.checkpoint.load import load, load_tokenizer_of
from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.config import DataConfig, ModelConfig
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.training.run import resume, train

MODELS = {
    "gpt2": ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_multiple=8),
    "llama": ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_multiple=8, family="llama"),
    "qwen3": ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_multiple=8, family="qwen3"),
    "rotary relu2": ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_multiple=8, family="llama", mlp="relu2"),
}


@pytest.fixture(scope="session")
def bpe(corpus):
    return build_tokenizer("bpe:300", [corpus.read_text()])


@pytest.fixture
def folder(tmp_path, bpe):
    def write(name: str = "gpt2") -> Path:
        config = dataclasses.replace(MODELS[name], vocab_size=bpe.vocab_size).resolved()
        (tmp_path / "model").mkdir()
        write_model(tmp_path / "model", config, GPT(config, seed=1).state_dict(), bpe)
        return tmp_path / "model"

    return write


@pytest.fixture
def tuned(tiny, change):
    def settings(init: Path, **options):
        base = {
            "optim": {"warmup_steps": 0},
            "model": {"init": str(init)},
            "data": {"tokenizer": DataConfig.tokenizer},
            "train": {"steps": 2},
        }
        for section, values in options.items():
            base[section] = {**base.get(section, {}), **values}
        return change(tiny, sample={"every": 0}, **base)

    return settings


def test_the_models_tokenizer_is_the_default(folder, tuned, tmp_path, capsys, bpe):
    result = train(tuned(folder()), tmp_path / "run")
    assert load_tokenizer_of(tmp_path / "run").fingerprint == bpe.fingerprint
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"changed: data.tokenizer: byte -> that of the initial weights (bpe, 300 tokens, fingerprint {bpe.fingerprint})"
        in shown
    )
    # The recorded configuration is a recipe: it resumes, also when the model has gone.
    (tmp_path / "model").rename(tmp_path / "moved")
    resume(result.folder, quiet=True)
    config = RunFolder(result.folder).config()
    assert load_tokenizer(config.data.tokenizer).fingerprint == bpe.fingerprint


def test_a_changed_configuration_may_leave_the_tokenizer_open_again(folder, tuned, tmp_path):
    asked = tuned(folder(), model={"n_layer": 1, "n_head": 2, "block_size": 64})
    train(asked, tmp_path / "run", quiet=True)
    longer = tuned(tmp_path / "model", model={"n_layer": 1, "n_head": 2, "block_size": 64}, train={"steps": 3})
    assert resume(tmp_path / "run", longer, quiet=True).step == 3


def test_a_shipped_recipes_tokenizer_gives_way_and_a_stated_one_does_not(folder, corpus, tmp_path, capsys):
    small = [
        "--train.steps",
        "1",
        "--optim.warmup_steps",
        "0",
        "--train.batch_size",
        "2",
        "--eval.every",
        "0",
        "--sample.every",
        "0",
    ]
    common = ["--model.init", str(folder()), "--data.source", str(corpus), "--device", "cpu", "--precision", "float32"]
    common += ["--compile", "off", "--model.block_size", "16", *small]
    main(["train", "quickstart", *common, "--out", str(tmp_path / "run")])
    assert "that of the initial weights" in capsys.readouterr().out
    own = tmp_path / "own.toml"
    own.write_text('[data]\ntokenizer = "byte"\n')
    for argv in (["quickstart", *common, "--data.tokenizer", "byte"], [str(own), *common]):
        with pytest.raises(SystemExit) as caught:
            main(["train", *argv, "--out", str(tmp_path / "other")])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert "its tokenizer (byte, 257 tokens, fingerprint" in error
        assert f"is not the model's ({tmp_path / 'model'}: bpe, 300 tokens, fingerprint" in error
        assert "omit data.tokenizer, or prepare the text with --tokenizer /" in error


def test_a_prepared_dataset_keeps_its_tokenizer_or_is_refused_with_both_names(folder, tuned, corpus, tmp_path, bpe):
    init = folder()
    prepare(str(corpus), tmp_path / "bytes", "byte")
    with pytest.raises(UserError, match=r"its tokenizer \(byte, 257 .*is not the model's \(.*model: bpe, 300") as caught:
        train(tuned(init, data={"source": str(tmp_path / "bytes")}), tmp_path / "run", quiet=True)
    # The remedy works.
    remedy = str(caught.value).rpartition("--tokenizer ")[2]
    prepare(str(corpus), tmp_path / "bpe", remedy)
    train(tuned(init, data={"source": str(tmp_path / "bpe")}), tmp_path / "run", quiet=True)
    assert load_tokenizer_of(tmp_path / "run").fingerprint == bpe.fingerprint


def test_a_model_of_bytes_uses_the_usual_dataset_of_bytes(tiny, change, tmp_path):
    first = change(tiny, optim={"warmup_steps": 0}, data={"tokenizer": "byte"}, train={"steps": 1}, sample={"every": 0})
    train(first, tmp_path / "first", quiet=True)
    train(change(first, model={"init": str(tmp_path / "first")}), tmp_path / "second", quiet=True)
    assert RunFolder(tmp_path / "second").config().data.tokenizer == "byte"


WARNED = [
    ({"lr": 6e-4}, "optim.lr = 0.0006: a learning rate for random weights", "try --optim.lr 3e-05"),
    ({"lr": 1.1e-4}, "optim.lr = 0.00011", "--optim.lr 3e-05"),
    ({"lr": 6e-4, "min_lr": 6e-5}, "optim.lr = 0.0006", "try --optim.lr 3e-05 --optim.min_lr 3e-06"),
    (
        {"name": "muon", "lr": 5e-3, "muon_lr": 0.02, "embed_lr": 0.05},
        "optim.lr = 0.005, optim.muon_lr = 0.02, optim.embed_lr = 0.05: these are learning rates for random weights",
        "--optim.lr 3e-05 --optim.name adamw",
    ),
]


@pytest.mark.parametrize(("optim", "message", "remedy"), WARNED)
def test_learning_rates_for_random_weights_are_reported(folder, tuned, tmp_path, capsys, optim, message, remedy):
    train(tuned(folder(), optim=optim, train={"steps": 1}), tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"WARNING: {message}" in shown
    assert remedy in shown
    resume(tmp_path / "run")
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("optim", [{"lr": 3e-5}, {"lr": 1e-4}, {"name": "muon", "lr": 1e-4, "muon_lr": 2e-3}])
def test_learning_rates_for_finetuning_are_not(folder, tuned, tmp_path, capsys, optim):
    train(tuned(folder(), optim=optim, train={"steps": 1}), tmp_path / "run")
    assert "WARNING" not in capsys.readouterr().out


def test_random_weights_are_not_warned_about(tiny, change, tmp_path, capsys):
    train(change(tiny, optim={"warmup_steps": 0}, train={"steps": 1}, sample={"every": 0}), tmp_path / "run")
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "qwen3", "rotary relu2"])
def test_a_rotary_model_keeps_its_context(name, folder, tuned, tmp_path, capsys):
    asked = tuned(folder(name), model={"block_size": 8}, checkpoint={"every": 1})
    train(asked, tmp_path / "run")
    config = RunFolder(tmp_path / "run").config().model
    assert (config.block_size, config.max_positions) == (8, 64)
    assert "of 4 x 8 tokens" in " ".join(capsys.readouterr().out.split())
    checkpoint = RunFolder(tmp_path / "run").store().latest(print)
    written = json.loads((checkpoint / "config.json").read_text())
    assert written["block_size" if name == "rotary relu2" else "max_position_embeddings"] == 64
    loaded = load(tmp_path / "run")
    assert (loaded.config.block_size, loaded.config.max_positions) == (64, None)
    assert loaded.build()(torch.zeros(1, 64, dtype=torch.int64)).shape[1] == 64
    if name != "rotary relu2":
        export_hf(str(tmp_path / "run"), tmp_path / "out")
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 64
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 64


def test_it_keeps_it_when_the_run_is_resumed_and_when_another_starts_from_it(folder, tuned, tmp_path):
    asked = tuned(folder("qwen3"), model={"block_size": 8})
    train(asked, tmp_path / "run", quiet=True)
    longer = RunFolder(tmp_path / "run").config()
    resume(tmp_path / "run", dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=3)), quiet=True)
    assert load(tmp_path / "run").config.block_size == 64
    train(tuned(tmp_path / "run", model={"block_size": 32}), tmp_path / "next", quiet=True)
    config = RunFolder(tmp_path / "next").config().model
    assert (config.block_size, config.max_positions) == (32, 64)
    train(tuned(tmp_path / "run", model={"block_size": 64}), tmp_path / "full", quiet=True)
    assert RunFolder(tmp_path / "full").config().model.max_positions is None


def test_eval_measures_sequences_as_long_as_the_run_trains_on(folder, tuned, tmp_path, capsys):
    train(tuned(folder("llama"), model={"block_size": 8}, eval={"every": 2, "windows": 10**6}), tmp_path / "run", quiet=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    during = [record["loss"] for record in records if record["kind"] == "val"][-1]
    main(["eval", str(tmp_path / "run"), "--device", "cpu", "--precision", "float32"])
    assert f"{during:.4f} nats per token" in capsys.readouterr().out


def test_learned_positions_are_cropped(folder, tuned, tmp_path):
    train(tuned(folder("gpt2"), model={"block_size": 8}), tmp_path / "run", quiet=True)
    loaded = load(tmp_path / "run")
    assert (loaded.config.block_size, loaded.config.max_positions) == (8, None)
    assert loaded.state["transformer.wpe.weight"].shape == (8, 16)
    written = json.loads((RunFolder(tmp_path / "run").store().latest(print) / "config.json").read_text())
    assert (written["n_positions"], written["n_ctx"]) == (8, 8)


@pytest.mark.parametrize(
    "options", [{"max_positions": 32}, {"max_positions": 8, "positions": "rotary"}, {"max_positions": 0, "positions": "rotary"}]
)
def test_a_maximum_that_makes_no_sense_is_refused(options):
    with pytest.raises(UserError, match=r"model\.max_positions = "):
        ModelConfig(block_size=16, **options)
