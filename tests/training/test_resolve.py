"""`resolve` decides every open setting once, with a reason, from facts that tests can replace."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bardling.checkpoint.load import Loaded
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from bardling.config.recipes import config_to_toml, parse_recipe
from bardling.distributed.context import SINGLE, Context
from bardling.errors import UserError
from bardling.training.facts import Facts
from bardling.training.resolve import resolve


class FakeFacts(Facts):
    """Facts without files and measurements."""

    def __init__(
        self, vocab_size=64, *, previous=None, start=None, speedup=1.0, flops=1e11, context=SINGLE, memory=None, **options
    ):
        super().__init__(context, RunFolder(Path("nowhere")), **options)
        self.memory = memory
        self.vocab_size, self.before, self.weights, self.speedup, self.flops = vocab_size, previous, start, speedup, flops

    @property
    def previous(self):
        return self.before

    @property
    def checkpoint(self):
        return None

    @property
    def device_memory(self):
        return self.memory

    def arranged(self, layout):
        return self.context

    def dataset(self, data, context=0):
        return SimpleNamespace(vocab_size=self.vocab_size, tokenizer=None, path="made up", manifest=SimpleNamespace(row=0))

    def start(self, init):
        return self.weights

    def bfloat16_speedup(self, device):
        return self.speedup

    def matmul_flops(self, device, dtype):
        return self.flops

    def compiler_problem(self, device, *, compiles):
        return None


SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)


def config(**options):
    sections = {"model": SMALL, "train": TrainConfig(steps=10, batch_size=8), "optim": OptimConfig(warmup_steps=2)}
    return RunConfig(**{"device": "cpu", **sections, **options})


def test_nothing_is_left_open_and_the_result_is_a_recipe():
    run = resolve(config(), FakeFacts())
    assert run.config.precision == "float32"
    assert run.config.compile == "off"
    assert run.config.model.vocab_size == 64
    assert run.config.optim.muon_precision == "float32"
    assert "auto" not in (run.config.precision, run.config.compile, run.config.optim.muon_precision)
    assert {reason.setting for reason in run.reasons} == {"model.vocab_size", "precision", "compile"}
    assert parse_recipe(config_to_toml(run.config), "test") == run.config
    again = resolve(run.config, FakeFacts())
    assert again.config == run.config, "a resolved configuration resolves to itself"


def test_fast_bfloat16_is_chosen_and_the_reason_contains_the_measured_ratio():
    run = resolve(config(), FakeFacts(speedup=2.34))
    assert run.config.precision == "bfloat16"
    assert run.config.optim.muon_precision == "bfloat16"
    assert "2.3" in run.why("precision")


def test_auto_compiles_a_run_that_is_long_enough_for_its_steps_or_its_deadline():
    # About 3e6 FLOPs a step: 10 steps take no time, but an hour is worth compiling for, however few steps are written down.
    assert not resolve(config(), FakeFacts()).execution.compiled
    hours = config(train=TrainConfig(steps=10, batch_size=8, deadline="8h"))
    assert resolve(hours, FakeFacts()).execution.compiled
    assert resolve(hours, FakeFacts()).config.compile == "on"
    seconds = config(train=TrainConfig(steps=10**9, batch_size=8, deadline="90s"))
    assert not resolve(seconds, FakeFacts()).execution.compiled, "the deadline ends it long before its steps are done"
    long = config(train=TrainConfig(steps=10**9, batch_size=8))
    assert resolve(long, FakeFacts()).execution.compiled
    assert not resolve(dataclasses.replace(hours, compile="off"), FakeFacts()).execution.compiled


def test_several_processes_replicate_the_model_and_divide_the_batch():
    run = resolve(config(), FakeFacts(context=Context(1, 4, torch.device("cpu"))))
    assert run.layout.sizes == (4, 1, 1, 1, 1)
    assert (run.plan.data_size, run.plan.micro_batch, run.plan.accumulation) == (4, 2, 1)
    with pytest.raises(UserError, match="does not divide among 3 processes"):
        resolve(config(), FakeFacts(context=Context(0, 3, torch.device("cpu"))))


def test_a_model_that_does_not_fit_is_sharded(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    model = ModelConfig(n_layer=4, n_head=2, n_embd=128, block_size=8)  # 0.8 million parameters of 16 bytes

    def layout(memory, **parallel):
        facts = FakeFacts(context=Context(1, 4, torch.device("cpu")), memory=memory)
        run = resolve(config(model=model, parallel=ParallelConfig(**parallel)), facts)
        return str(run.layout), run.why("parallel.layout")

    assert layout(100e6)[0] == "DDP (replicate 4)"
    assert layout(10e6) == ("HSDP (replicate 2, shard 2)", layout(10e6)[1])
    assert "of weights, gradients and optimizer state and" in layout(10e6)[1]
    assert layout(5e6)[0] == "FSDP2 (shard 4)"
    assert layout(5e6, layout="ddp") == ("DDP (replicate 4)", "as configured")
    assert layout(None, shard=2)[0] == "HSDP (replicate 2, shard 2)"
    with pytest.raises(UserError, match=r"parallel.shard = 3: needs a multiple of 3 processes, but there are 4: nearest .* 2"):
        layout(None, shard=3)


def test_depth_derives_the_settings_that_are_not_given():
    deep = config(model=ModelConfig(depth=2, block_size=32), train=TrainConfig(), optim=OptimConfig())
    deep = dataclasses.replace(deep, model=dataclasses.replace(deep.model, n_head=4))
    run = resolve(deep, FakeFacts(given={"model.depth", "model.block_size", "model.n_head"}))
    assert (run.config.model.depth, run.config.model.n_layer, run.config.model.n_embd) == (0, 2, 128)
    assert run.config.model.n_head == 4
    derived = {reason.setting for reason in run.reasons if reason.from_depth}
    assert {"model.n_embd", "train.steps", "optim.lr"} <= derived
    assert "model.n_head" not in derived


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    data = resolve(config(data=DataConfig(source="text.txt", cache="cache")), FakeFacts()).config.data
    assert (data.source, data.cache) == (str(tmp_path / "text.txt"), str(tmp_path / "cache"))
    assert resolve(config(data=DataConfig(source="shakespeare")), FakeFacts()).config.data.source == "shakespeare"
    assert resolve(config(data=DataConfig(source="a/*.md")), FakeFacts()).config.data.source == str(tmp_path / "a/*.md")


def test_a_resumed_run_keeps_decisions_and_reports_changes():
    first = resolve(config(), FakeFacts(speedup=2.0)).config
    open_again = dataclasses.replace(first, precision="auto", compile="auto", train=dataclasses.replace(first.train, steps=20))
    run = resolve(open_again, FakeFacts(speedup=0.5, previous=first, resumed=True))
    assert (run.config.precision, run.config.compile) == ("bfloat16", "off")
    assert run.changes == ("train.steps: 10 -> 20",)


@pytest.mark.parametrize(
    ("section", "change"),
    [("", {"seed": 7}), ("model", {"n_embd": 32}), ("data", {"val_fraction": 0.2}), ("optim", {"name": "muon"})],
)
def test_a_resumed_run_refuses_incompatible_changes(section, change):
    first = resolve(config(), FakeFacts()).config
    part = dataclasses.replace(getattr(first, section), **change) if section else None
    changed = dataclasses.replace(first, **({section: part} if section else change))
    (name,) = change
    with pytest.raises(UserError, match=rf"{section and section + '.'}{name} = .*start a new run"):
        resolve(changed, FakeFacts(previous=first, resumed=True))


def test_more_steps_keep_the_stages_of_a_growing_batch():
    growing = config(train=TrainConfig(steps=16, batch_size=8, batch_start=2, ramp=0.5))
    first = resolve(growing, FakeFacts())
    longer = dataclasses.replace(first.config, train=dataclasses.replace(first.config.train, steps=32))
    run = resolve(longer, FakeFacts(previous=first.config, resumed=True))
    assert [stage.first_step for stage in run.plan.stages] == [stage.first_step for stage in first.plan.stages]


def test_initial_weights_determine_the_architecture():
    weights = Loaded(ModelConfig(n_layer=3, n_head=1, n_embd=8, block_size=16, vocab_size=64).resolved(), {})
    asked = config(model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.1, init="elsewhere"))
    run = resolve(asked, FakeFacts(start=weights))
    model = run.config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (3, 1, 8, 8, 0.1)
    assert run.changes == tuple(
        f"model.{key}: {a} -> {b}, as in the initial weights"
        for key, a, b in (("n_layer", 1, 3), ("n_head", 2, 1), ("n_embd", 16, 8))
    )
    with pytest.raises(UserError, match="has a vocabulary of 65 tokens, but the model only 64"):
        resolve(asked, FakeFacts(65, start=weights))


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(UserError, match=r"model.vocab_size = 63 is smaller than the tokenizer's 65"):
        resolve(config(model=dataclasses.replace(SMALL, vocab_size=63)), FakeFacts(65))
    assert resolve(config(model=dataclasses.replace(SMALL, vocab_size=80)), FakeFacts()).config.model.vocab_size == 80


def test_another_micro_batch_keeps_the_horizon():
    run = resolve(config(), FakeFacts())
    run.plan.horizon.steps = 77
    smaller = run.with_micro_batch(2)
    assert (smaller.plan.steps, smaller.plan.micro_batch, smaller.plan.accumulation) == (77, 2, 4)
    assert smaller.config.train.micro_batch == 2
    assert "micro_batch = 2" in config_to_toml(smaller.config)
