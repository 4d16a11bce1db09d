"""`model.depth`: the derived values, and values given by the user, which are kept and followed."""

import dataclasses

import pytest

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.errors import UserError
from bardling.planning.costs import matmul_parameters
from bardling.planning.depth import apply_depth, derive, expected_vocab_size
from bardling.planning.plan import plan
from bardling.training.run import train

MUON = OptimConfig(name="muon")


def with_depth(depth, *, optim=MUON, **model):
    return RunConfig(model=ModelConfig(depth=depth, **{"vocab_size": 50257, **model}), optim=optim)


def test_sizes_grow_with_depth_and_rates_fall():
    before = None
    for depth in range(1, 49):
        now = {key: derived.value for key, derived in derive(with_depth(depth), set()).items()}
        assert now["model.n_embd"] % now["model.n_head"] == 0
        assert now["model.n_embd"] // now["model.n_head"] == 64
        assert now["train.batch_size"] & (now["train.batch_size"] - 1) == 0
        assert 0 < now["optim.warmup_steps"] < now["train.steps"]
        assert now["optim.muon_lr"] == OptimConfig().muon_lr
        if before is not None:
            assert all(now[key] > before[key] for key in ("model.n_layer", "model.n_embd", "model.n_head"))
            assert now["train.batch_size"] >= before["train.batch_size"]
            assert now["optim.lr"] <= before["optim.lr"]
            tokens, fewer = (each["train.batch_size"] * each["train.steps"] for each in (now, before))
            assert tokens > fewer
        before = now


def test_depth_twelve_is_gpt2_with_chinchillas_horizon():
    config = with_depth(12, optim=OptimConfig(), block_size=1024)
    values = {key: derived.value for key, derived in derive(config, set()).items()}
    assert (values["model.n_embd"], values["model.n_head"]) == (768, 12)
    tokens = values["train.steps"] * values["train.batch_size"] * 1024
    assert tokens == pytest.approx(20 * 123.65e6, rel=0.01)
    # 6 N D = 1.8e18 FLOPs: 0.292 * 1.8e18**0.3271 = 274,000 tokens are 268 sequences, and 0.3118 * 1.8e18**-0.125 = 1.6e-3.
    assert (values["train.batch_size"], values["optim.lr"]) == (256, 1.6e-3)
    assert "optim.muon_lr" not in values


def test_a_published_run_is_reproduced(monkeypatch):
    # DeepSeek LLM 7B (30 layers, 4096 channels, 2T tokens, context 4096): 2304 sequences, learning rate 4.2e-4 (its table 2).
    sizes = {"n_layer": 30, "n_embd": 4096, "n_head": 32}
    config = with_depth(30, family="llama", **sizes, block_size=4096, mlp_hidden=11008, vocab_size=102400)
    monkeypatch.setattr("bardling.planning.depth.TOKENS_PER_PARAMETER", 2e12 / matmul_parameters(config.model))
    values = derive(config, {f"model.{name}" for name in sizes})
    assert values["train.batch_size"].value == 2048
    assert values["optim.lr"].value == pytest.approx(4.2e-4, rel=0.05)


def test_given_values_are_kept_and_followed():
    config = RunConfig(
        model=ModelConfig(depth=8, n_embd=320, block_size=128, n_layer=3, n_head=5, tied=False),
        data=DataConfig(tokenizer="bpe:4096"),
        train=TrainConfig(batch_size=24),
        optim=MUON,
    )
    filled = apply_depth(config, {"model.depth", "model.n_embd", "train.batch_size", "data.tokenizer", "device"})
    assert (filled.model.n_layer, filled.model.n_embd, filled.model.n_head, filled.model.depth) == (8, 320, 5, 0)
    assert filled.train.batch_size == 24
    n = matmul_parameters(dataclasses.replace(filled.model, vocab_size=4096))
    assert filled.train.steps * 24 * 128 == pytest.approx(20 * n, rel=1e-3)
    assert filled.optim.embed_lr == pytest.approx(10 * filled.optim.lr)
    assert filled.optim.name == "muon"
    assert apply_depth(filled, set()) is filled


def test_every_derived_value_has_a_reason():
    values = derive(with_depth(4, tied=False, vocab_size=0), set())
    assert set(values) == {
        "model.n_layer",
        "model.n_embd",
        "model.n_head",
        "train.batch_size",
        "train.steps",
        "optim.warmup_steps",
        "optim.lr",
        "optim.muon_lr",
        "optim.embed_lr",
    }
    assert all(derived.why for derived in values.values())
    tied = derive(with_depth(4, vocab_size=0), set())
    assert values.keys() - tied.keys() == {"optim.embed_lr"}


def test_heads_divide_any_width():
    for width in (1, 63, 100, 192, 257, 500):
        values = derive(with_depth(3, n_embd=width, n_head=1, vocab_size=300), {"model.n_embd"})
        assert width % values["model.n_head"].value == 0
    assert derive(with_depth(3, head_dim=32, vocab_size=300), set())["model.n_head"].value == 6


def test_invalid_depths_are_refused():
    with pytest.raises(UserError, match=r"model\.depth = 1000: must be between 1 and 200"):
        derive(with_depth(1000), set())
    with pytest.raises(UserError, match=r"model\.depth"):
        ModelConfig(depth=-1)


def test_the_vocabulary_size_is_inferred_from_the_tokenizers_name():
    assert [expected_vocab_size(name) for name in ("byte", "char", "bpe:512", "bpe:x", "gpt2")] == [257, 128, 512, 50257, 50257]


def test_in_python_settings_that_differ_from_the_default_are_kept():
    config = RunConfig(
        model=ModelConfig(depth=4, n_head=2, block_size=128), data=DataConfig(tokenizer="byte"), train=TrainConfig(steps=77)
    )
    filled = apply_depth(config)
    assert filled == apply_depth(config, {"model.n_head", "model.block_size", "train.steps"})
    assert (filled.model.depth, filled.model.n_layer, filled.model.n_head, filled.train.steps) == (0, 4, 2, 77)
    assert apply_depth(filled) is filled


def test_training_from_python_applies_the_depth(tiny, change, tmp_path):
    config = change(tiny, model={"depth": 1, "n_layer": 6}, optim={"warmup_steps": 0}, train={"steps": 1})
    folder = train(config, tmp_path / "run", quiet=True).folder
    model = RunFolder(folder).config().model
    assert (model.depth, model.n_layer, model.n_embd) == (0, 1, tiny.model.n_embd)
    assert plan(config).model.n_layer == 1
