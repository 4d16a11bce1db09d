import dataclasses
from pathlib import Path

import pytest
import torch

from bardling.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.data.tokens.manifest import Manifest, ShardFile, SplitInfo, write_manifest
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.optim.serialization import optimizer_tensors
from bardling.planning.activations import activation_bytes
from bardling.planning.plan import plan, resolve_vocabulary
from bardling.training.build import Execution, build

# nanoGPT's train_gpt2.py: 12 sequences, 40 forward passes over 8 GPUs, 600,000 steps.
GPT2 = RunConfig(
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False),
    optim=OptimConfig(warmup_steps=2000),
    train=TrainConfig(batch_size=480, micro_batch=12, steps=600_000),
    eval=EvalConfig(every=1000, windows=200),
    checkpoint=CheckpointConfig(every=1000, keep_last=2),
)


def test_gpt2_124m_on_eight_a100() -> None:
    result = plan(GPT2, world_size=8, device_name="NVIDIA A100-SXM4-40GB", mfu=0.3, dataset_tokens=9_035_582_198)
    assert result.parameters == 124_337_664
    assert result.block_parameters == 84_953_088
    assert result.batch.accumulation == 5
    assert result.batch.tokens_per_step == 491_520
    assert result.total_tokens == 491_520 * 600_000
    assert result.epochs == pytest.approx(491_520 * 600_000 / 9_035_582_198)
    assert result.flops_per_token * 1024 == 874_944_921_600
    assert result.flops_per_step == 874_944_921_600 * 480
    assert result.flops_training == 874_944_921_600 * 480 * 600_000
    assert result.flops_validation == 600 * 200 * 291_648_307_200
    assert result.seconds == pytest.approx(result.flops / (8 * 312e12 * 0.3))
    assert result.seconds is not None
    assert 3.8 < result.seconds / 86_400 < 4.0  # its README says about four days
    assert result.tokens_per_second == pytest.approx(8 * 312e12 * 0.3 / 854_438_400)


def test_memory_and_disk() -> None:
    result = plan(GPT2, world_size=8, device_name="A100-40GB")
    held = 124_337_664 + 47 * 768  # padded rows are held too
    assert result.memory.weights == result.memory.gradients == 4 * held
    counts = 4 * (2 + 12 * 6 + 1)  # of AdamW's steps, one for each tensor
    assert result.memory.optimizer == 8 * held + counts
    assert result.memory.total == 16 * held + counts + activation_bytes(result.model, 12).total
    assert result.device_memory == 40 * 10**9
    assert not any("does not fit" in note for note in result.notes)
    assert result.checkpoint_bytes == 12 * held + counts
    assert result.checkpoints_kept == 4  # two newest, the best, the one being written
    assert result.disk_bytes == 4 * result.checkpoint_bytes


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "tied": False}, {"family": "qwen3", "n_kv_head": 1, "value_embeddings": 1}],
)
def test_optimizer_and_checkpoint_have_the_bytes_of_a_real_state(name, ema, options) -> None:
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, vocab_multiple=8, **options)
    config = RunConfig(model=model, optim=OptimConfig(name=name, ema_decay=ema), train=TrainConfig(steps=200, batch_size=2))
    state = build(config.model, config.optim, Execution(Precision("float32", "test", "cpu")), SINGLE).state
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    kept, _ = optimizer_tensors(state.optimizer, dict(state.model.named_parameters()))
    means = {} if state.ema is None else state.ema.tensors()
    weights = state.model.state_dict()
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (weights, kept, means)]
    result = plan(config)
    assert [result.memory.weights, result.memory.optimizer, result.memory.ema] == sizes
    assert result.checkpoint_bytes == sum(sizes)
    assert 0 < state.checkpoint_bytes() - sum(sizes) <= 100_000


def test_a_run_with_one_checkpoint_keeps_one() -> None:
    config = dataclasses.replace(GPT2, checkpoint=CheckpointConfig(every=0, save_best=False))
    assert plan(config, world_size=8).checkpoints_kept == 1


def test_too_large_a_micro_batch_names_one_that_fits() -> None:
    config = dataclasses.replace(GPT2, train=TrainConfig(batch_size=480, steps=600_000))
    result = plan(config, device_name="NVIDIA L4")
    (note,) = [note for note in result.notes if "does not fit" in note]
    micro = int(note.split("--train.micro_batch ")[1].split()[0].rstrip("."))
    smaller = dataclasses.replace(GPT2, train=TrainConfig(batch_size=480, micro_batch=micro, steps=600_000))
    assert not any("does not fit" in note for note in plan(smaller, device_name="NVIDIA L4").notes)
    assert "--train.recompute blocks (25% more time)" not in note, "even with it, 480 sequences are too many"
    hopeless = plan(config, device_name="NVIDIA L4", device_memory=10**9)
    assert any("not even one sequence" in note for note in hopeless.notes)


def test_recomputed_activations_are_work_of_the_device_and_not_of_the_model() -> None:
    again = dataclasses.replace(GPT2, train=dataclasses.replace(GPT2.train, recompute="blocks"))
    options = {"world_size": 8, "device_name": "A100-40GB", "mfu": 0.4}
    before, after = plan(GPT2, **options), plan(again, **options)  # type: ignore[arg-type]
    assert before.flops_recomputed == 0
    assert after.flops == before.flops
    blocks = 12 * 17_716_740_096 - 11 * 8 * 1024 * 768**2  # compiled, only the last block's last product is done again
    assert after.flops_recomputed == blocks // 1024 * 1024 * 480 * 600_000
    eager = plan(dataclasses.replace(again, compile="off"), **options)  # type: ignore[arg-type]
    assert eager.flops_recomputed == after.flops_recomputed - 8 * 768**2 * 1024 * 480 * 600_000
    in_float8 = plan(dataclasses.replace(again, compile="off", fp8=True), **options)  # type: ignore[arg-type]
    assert in_float8.flops_recomputed == 12 * 17_716_740_096 * 480 * 600_000
    assert after.seconds == pytest.approx((before.flops + after.flops_recomputed) / (8 * 312e12 * 0.4))
    assert before.seconds is not None
    assert after.seconds is not None
    assert 1.15 < after.seconds / before.seconds < 1.34
    assert after.tokens_per_second == pytest.approx(8 * 312e12 * 0.4 * after.model_fraction / 854_438_400)
    assert after.memory.activations.blocks < before.memory.activations.blocks / 8
    assert after.memory.total < before.memory.total
    hour = [plan(config, budget_seconds=3600, **options).comparison.flops for config in (GPT2, again)]  # type: ignore[arg-type]
    assert hour[1] == pytest.approx(hour[0] * after.model_fraction)


def test_recomputing_is_a_remedy_for_too_little_memory() -> None:
    config = dataclasses.replace(GPT2, train=TrainConfig(batch_size=480, micro_batch=48, steps=600_000))
    (note,) = [note for note in plan(config, device_name="NVIDIA L4", device_memory=10**10).notes if "does not fit" in note]
    assert note.endswith("use --train.micro_batch 12 or --train.recompute blocks (25% more time).")
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="blocks"))
    assert not any("does not fit" in text for text in plan(again, device_name="NVIDIA L4", device_memory=10**10).notes)
    long = dataclasses.replace(config.model, block_size=65536)
    (note,) = [
        note
        for note in plan(dataclasses.replace(config, model=long), device_name="NVIDIA L4", device_memory=12 * 10**9).notes
        if "does not fit" in note
    ]
    assert "memory: use --train.recompute blocks --train.micro_batch 1 (25% more time)." in note


def test_an_unknown_device_has_no_time_and_says_so() -> None:
    result = plan(GPT2, world_size=8, device_name="Imaginary 3000")
    assert result.peak_flops is None
    assert result.seconds is None
    assert result.tokens_per_second is None
    assert any("Imaginary 3000" in note for note in result.notes)
    with pytest.raises(UserError, match="Imaginary 3000"):
        plan(GPT2, device_name="Imaginary 3000", budget_seconds=3600)
    assert plan(GPT2, device_name="Imaginary 3000", peak_flops=1e14, mfu=0.5).flops_per_second == 5e13


def test_precision_picks_the_peak() -> None:
    config = dataclasses.replace(GPT2, precision="float32")
    assert plan(config, device_name="A100").peak_flops == 156e12
    assert plan(dataclasses.replace(config, deterministic=True), device_name="A100").peak_flops == 19.5e12
    assert plan(config, device_name="A100").memory.activations.weight_copies == 0


def test_comparison_with_the_scaling_fits() -> None:
    result = plan(GPT2, world_size=8, device_name="A100")
    comparison = result.comparison
    assert comparison.parameters == 124_337_664 - 786_432
    assert comparison.flops == pytest.approx(6 * comparison.parameters * result.total_tokens)
    assert "a larger model" in comparison.verdict
    short = dataclasses.replace(GPT2, train=TrainConfig(batch_size=480, micro_batch=12, steps=5000))
    assert "in balance" in plan(short, world_size=8).comparison.verdict
    shorter = dataclasses.replace(GPT2, train=TrainConfig(batch_size=480, micro_batch=12, steps=2001))
    assert "a smaller model" in plan(shorter, world_size=8).comparison.verdict


def test_budgets() -> None:
    by_time = plan(GPT2, world_size=8, device_name="A100", mfu=0.5, budget_seconds=86_400).comparison
    assert by_time.flops == pytest.approx(8 * 312e12 * 0.5 * 86_400)
    by_flops = plan(GPT2, world_size=8, budget_flops=by_time.flops).comparison
    assert by_flops.optima == by_time.optima
    assert by_flops.steps_in_budget == int(by_time.flops // (874_944_921_600 * 480))


def test_repeated_data_is_pointed_out() -> None:
    assert any("epochs: beyond" in note for note in plan(GPT2, dataset_tokens=9_000_000_000).notes)
    assert not any("epochs: beyond" in note for note in plan(GPT2, dataset_tokens=290_000_000_000).notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mfu": 0.0}, "mfu = 0.0"),
        ({"mfu": 40.0}, "mfu = 40.0"),
        ({"world_size": 0}, "gpus = 0"),
        ({"world_size": 7}, "does not divide among 7"),
        ({"dataset_tokens": 0}, "dataset_tokens = 0"),
        ({"budget_flops": float("nan")}, "budget = nan"),
        ({"budget_flops": 1e20, "budget_seconds": 60.0}, "give one of them"),
    ],
)
def test_bad_questions_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(GPT2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "size"), [("byte", 257), ("bpe:4096", 4096), ("char", 128)])
def test_vocabulary_follows_the_tokenizer(spec: str, size: int) -> None:
    model, notes = resolve_vocabulary(RunConfig(data=DataConfig(tokenizer=spec)))
    assert model.vocab_size == size
    assert bool(notes) == (spec == "char")


def test_a_set_vocabulary_wins() -> None:
    model, _ = resolve_vocabulary(RunConfig(model=ModelConfig(vocab_size=99), data=DataConfig(tokenizer="no such file")))
    assert model.vocab_size == 99


def test_vocabulary_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer("char", ["abc", "def"]).save(tmp_path)
    model, _ = resolve_vocabulary(RunConfig(data=DataConfig(tokenizer=str(path))))
    assert model.vocab_size == build_tokenizer("char", ["abc", "def"]).vocab_size
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        resolve_vocabulary(RunConfig(data=DataConfig(tokenizer=str(path))))


def test_a_prepared_folder_says_its_size(tmp_path: Path) -> None:
    def split(name: str, tokens: int) -> SplitInfo:
        return SplitInfo(tokens, 1, 0, (ShardFile(f"{name}-00000.bin", tokens, 2 * tokens, "0" * 64),))

    manifest = Manifest("uint16", 1234, "", {"spec": "x"}, 0.05, split("train", 1000), split("val", 100))
    write_manifest(tmp_path, manifest)
    config = RunConfig(data=DataConfig(source=str(tmp_path)), train=TrainConfig(steps=1000, batch_size=2))
    result = plan(config)
    assert result.model.vocab_size == 1234
    assert result.epochs == 1000 * 2 * 256 / 1000
    assert plan(config, dataset_tokens=2000).epochs == 1000 * 2 * 256 / 2000


@pytest.mark.parametrize("spec", ["bpe:many", "bpe:0", "bpe:", "missing.json"])
def test_bad_tokenizers_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        resolve_vocabulary(RunConfig(data=DataConfig(tokenizer=spec)))
