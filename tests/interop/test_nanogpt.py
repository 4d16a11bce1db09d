"""nanoGPT's settings mean here what they meant there."""

from pathlib import Path

import pytest

from bardling.config import RunConfig
from bardling.config.recipes import parse_recipe
from bardling.errors import UserError
from bardling.interop.nanogpt import NanoGPTRun, nanogpt_settings, recipe_toml, run_config_from_nanogpt, sample_from_nanogpt
from bardling.interop.nanogpt_keys import BENCH_KEYS, PLACES, SAMPLE_KEYS, TRAIN_DEFAULTS, TRAIN_KEYS
from bardling.interop.python_config import parse_flat_flags, read_nanogpt_arguments

CHAR_CONFIG = """# a small character model, as people keep it beside nanoGPT
out_dir = 'out-char'
eval_interval = 250 # often
eval_iters = 20
always_save_checkpoint = False
wandb_log = False
wandb_project = 'chars'
dataset = 'plays_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
"""

FINETUNE_CONFIG = """import time

out_dir = 'out-ft'
wandb_log = True
wandb_run_name = 'ft-' + str(time.time())
init_from = 'gpt2-xl'
batch_size = 1
gradient_accumulation_steps = 4 * 8
max_iters = 20
learning_rate = 3e-5
decay_lr = False
"""


def translated(tmp_path: Path, text: str, *flags: str, world_size: int = 1) -> NanoGPTRun:
    path = tmp_path / "config.py"
    path.write_text(text)
    return run_config_from_nanogpt(read_nanogpt_arguments([str(path), *flags], TRAIN_KEYS, TRAIN_DEFAULTS), world_size)


def test_the_tables_are_complete() -> None:
    assert (len(TRAIN_KEYS), len(SAMPLE_KEYS), len(BENCH_KEYS)) == (33, 11, 9)


def test_a_character_model(tmp_path: Path) -> None:
    run = translated(tmp_path, CHAR_CONFIG)
    config = run.config
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size) == (6, 6, 384, 256)
    assert (config.model.dropout, config.model.bias, config.model.gelu, config.model.vocab_size) == (0.2, False, "erf", 0)
    assert (config.train.batch_size, config.train.micro_batch, config.train.steps) == (64, 64, 5000)
    assert (config.optim.lr, config.optim.min_lr, config.optim.betas) == (1e-3, 1e-4, (0.9, 0.99))
    assert (config.optim.schedule, config.optim.warmup_steps, config.optim.decay_steps) == ("cosine", 100, 5000)
    assert (config.eval.every, config.eval.windows) == (250, 20 * 64)
    assert (config.checkpoint.every, config.checkpoint.save_best) == (0, True)
    assert (config.device, config.precision, config.compile, config.seed) == ("auto", "auto", "auto", 1337)
    assert (run.out, run.init_from, run.eval_only, run.config.monitor.wandb) == (Path("out-char"), "scratch", False, "off")
    assert config.data.source == str(Path("data/plays_char"))


def test_the_cpu_command_of_its_readme(tmp_path: Path) -> None:
    flags = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
        "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    config = translated(tmp_path, CHAR_CONFIG, *flags.split()).config
    assert (config.device, config.precision, config.compile) == ("cpu", "float32", "off")
    assert (config.model.n_embd, config.model.dropout, config.train.batch_size, config.optim.decay_steps) == (
        128,
        0.0,
        12,
        2000,
    )


def test_finetuning_at_a_constant_rate(tmp_path: Path) -> None:
    # nanoGPT's default min_lr (6e-5) is above this learning rate; with decay_lr = False neither it nor the warm-up counts.
    run = translated(tmp_path, FINETUNE_CONFIG, "--dropout=0.1")
    assert (run.config.optim.schedule, run.config.optim.warmup_steps, run.config.optim.lr) == ("constant", 0, 3e-5)
    model = run.config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.vocab_size) == (48, 25, 1600, 50257)
    assert (model.bias, model.gelu, model.dropout) == (True, "tanh", 0.1)
    assert (run.init_from, model.init, run.config.train.batch_size, run.config.train.micro_batch) == (
        "gpt2-xl",
        "gpt2-xl",
        32,
        1,
    )
    assert run.config.monitor.wandb == "online"
    assert run.config.monitor.wandb_name.startswith("ft-1")


def test_accumulation_counts_all_processes() -> None:
    for world_size in (1, 2, 4, 8):
        config = run_config_from_nanogpt({}, world_size).config
        assert (config.train.batch_size, config.train.micro_batch) == (480, 12)
    with pytest.raises(UserError, match=r"not divisible by 3: try --gradient_accumulation_steps=39"):
        run_config_from_nanogpt({}, 3)


def test_a_dataset_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "old" / "data" / "plays"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(b"\0\0")
    config = run_config_from_nanogpt({"dataset": "plays"}, data_parents=[tmp_path / "old"]).config
    assert config.data.source == str(folder)
    config = run_config_from_nanogpt({"dataset": "shakespeare_char"}).config
    assert (config.data.source, config.data.tokenizer) == ("shakespeare-char", "char")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--n_embd=100", "n_embd = 100 is not divisible by n_head = 12: try --n_embd=96 or 108"),
        ("--init_from=gpt3", "init_from = 'gpt3'"),
        ("--learning_rate=1e-5", "min_lr = 6e-05 is above learning_rate = 1e-05"),
        ("--lr_decay_iters=2000", "warmup_iters = 2000 leaves no steps for the decay"),
        ("--batch_size=0", "batch_size = 0"),
        ("--eval_iters=-1", "eval_iters = -1"),
        ("--dtype=bf16", "choose float32, bfloat16 or float16"),
        ("--dropout=1.0", "dropout = 1.0: must be"),
        ("--beta2=1.0", "beta1, beta2 = (0.9, 1.0): must"),
        ("--grad_clip=-1", "grad_clip = -1.0: must"),
    ],
)
def test_values_that_do_not_fit(flag: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config_from_nanogpt(parse_flat_flags([flag], TRAIN_KEYS))
    assert words in str(caught.value)
    assert "optim." not in str(caught.value)
    assert "model." not in str(caught.value)


def test_a_gpt2_knows_no_more_than_its_positions() -> None:
    with pytest.raises(UserError, match="block_size = 2048: gpt2 has 1024"):
        run_config_from_nanogpt({"init_from": "gpt2", "block_size": 2048})
    assert run_config_from_nanogpt({"init_from": "gpt2", "block_size": 512}).config.model.block_size == 512


def test_precision_follows_the_device() -> None:
    assert run_config_from_nanogpt({"dtype": "float16", "device": "cuda:1"}).config.precision == "float16"
    run = run_config_from_nanogpt({"dtype": "float16", "device": "mps"})
    assert run.config.precision == "float32"
    assert any("only takes effect on CUDA" in note for note in run.notes)


@pytest.mark.parametrize(
    "text",
    [CHAR_CONFIG, FINETUNE_CONFIG, "", "max_iters = 0\neval_only = True\nout_dir = 'a\\nb = \\x013'\ninit_from = 'gpt2'"],
)
def test_the_migrated_recipe_is_the_same_run(tmp_path: Path, text: str) -> None:
    run = translated(tmp_path, text)
    assert parse_recipe(recipe_toml(run, "config.py"), "recipe") == run.config


def test_every_place_is_a_setting() -> None:
    config = RunConfig()
    for place, keys in PLACES.items():
        section, _, name = place.rpartition(".")
        assert hasattr(getattr(config, section) if section else config, name)
        for key in keys.replace("*", ",").split(","):
            assert key.strip() in TRAIN_KEYS


def test_there_and_back(tmp_path: Path) -> None:
    run = translated(
        tmp_path, CHAR_CONFIG, "--gradient_accumulation_steps=4", "--device=cpu", "--dtype=float32", "--compile=False"
    )
    settings = nanogpt_settings(run.config, Path("out-char"), "plays_char")
    assert list(settings) == list(TRAIN_DEFAULTS)
    assert all(type(settings[key]) is TRAIN_KEYS[key] for key in settings)
    again = run_config_from_nanogpt(settings)
    assert again.config == run.config


def test_sampling(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("O Romeo", encoding="utf-8")
    flags = [f"--start=FILE:{prompt}", "--num_samples=5", "--max_new_tokens=100", "--out_dir=out-x", "--device=cpu"]
    sample = sample_from_nanogpt(parse_flat_flags(flags, SAMPLE_KEYS))
    assert sample == {
        **{"prompt": "O Romeo", "num_samples": 5, "max_new_tokens": 100, "model": "out-x", "device": "cpu"},
        **{"temperature": 0.8, "top_k": 200, "seed": 1337, "precision": "float32", "compile": False},
    }
    assert sample_from_nanogpt({"init_from": "gpt2-xl", "start": "What?"})["model"] == "gpt2-xl"
    with pytest.raises(UserError, match="no such file"):
        sample_from_nanogpt({"start": f"FILE:{tmp_path / 'none'}"})
