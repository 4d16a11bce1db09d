"""nanoGPT's command lines, run with Bardling's commands in a folder laid out like a nanoGPT checkout."""

import dataclasses
import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bardling.checkpoint.load import load, load_model
from bardling.cli.bench import nanogpt_options
from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.model.gpt import GPT

# Written for these tests, with the constructs that nanoGPT's own files use: comments, arithmetic, an import of time.
CHAR = """# a character model on one text
# good for a quick look on a laptop

out_dir = 'out-shakespeare-char'
eval_interval = 250 # often, since it will overfit
eval_iters = 200
log_interval = 10 # not too much

always_save_checkpoint = False

wandb_log = False # on the command line if wanted
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # context of up to 256 characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3 # small models can go higher
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4 # learning_rate / 10
beta2 = 0.99

warmup_iters = 100

# device = 'cpu'
# compile = False
"""

GPT2 = """# GPT-2 (124M) on 8 GPUs: $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'

# 12 sequences * 1024 tokens * 5 accumulated * 8 GPUs = 491,520
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
"""

FINETUNE = """import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl' # the largest

always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
"""

EVAL = """# the untrained-further GPT-2
batch_size = 8
eval_iters = 500 # more, for a better estimate
eval_only = True
wandb_log = False
init_from = 'gpt2'
"""

README_CPU = shlex.split(
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SHORTER = ["--max_iters=4", "--lr_decay_iters=4", "--warmup_iters=1", "--eval_iters=1"]

TEXT = "".join(f"What is {a} and {b}? A rose, by any other name: {a * b}.\n" for a in range(30) for b in range(20))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A checkout as nanoGPT's users have it: config/, data/shakespeare_char/ with a meta.pkl, data/shakespeare/ without."""
    (tmp_path / "config").mkdir()
    for name, text in (
        ("train_shakespeare_char", CHAR),
        ("train_gpt2", GPT2),
        ("finetune_shakespeare", FINETUNE),
        ("eval_gpt2", EVAL),
    ):
        (tmp_path / "config" / f"{name}.py").write_text(text)
    characters = sorted(set(TEXT))
    stoi = {character: number for number, character in enumerate(characters)}
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    for name in ("shakespeare_char", "shakespeare", "openwebtext"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        ids = np.array([stoi[character] for character in TEXT], np.uint16)
        ids[: int(0.9 * len(ids))].tofile(folder / "train.bin")
        ids[int(0.9 * len(ids)) :].tofile(folder / "val.bin")
        if name == "shakespeare_char":
            (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    return tmp_path


def records(run: Path, kind: str):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def snapshot(folder: Path):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("bardling: ")
    return message


def test_the_readmes_cpu_command_then_sample_resume_and_evaluate(workplace, capsys):
    main(["train", *README_CPU, *SHORTER])
    run = workplace / "out-shakespeare-char"
    trained = records(run, "train")
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    assert trained[0]["lr"] == pytest.approx(1e-3 / 2)  # the config's rate, in nanoGPT's warm-up of one step
    assert trained[-1]["lr"] == pytest.approx(1e-4 + 9e-4 * 0.25)  # three quarters down the cosine from step 1 to 4
    assert trained[-1]["loss"] < trained[0]["loss"]
    loaded = load(run)
    model = loaded.config
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (model.bias, model.gelu, model.vocab_size) == (False, "erf", len(set(TEXT)))
    assert "steps are done, and the last one is saved" in capsys.readouterr().err
    assert [record["step"] for record in records(run, "val")] == [4]

    # Evaluation only: with resume nanoGPT would train and save here.
    before = snapshot(run)
    main(["train", *README_CPU, *SHORTER, "--init_from=resume", "--eval_only=True", "--max_iters=9"])
    assert "val loss" in capsys.readouterr().out
    assert snapshot(run) == before

    # Resumed with more iterations, and with nothing said of the model: its shape is the run's.
    short = [*SHORTER, "--batch_size=12", "--log_interval=1", "--device=cpu", "--compile=False", "--dropout=0.1"]
    main(["train", "config/train_shakespeare_char.py", *short, "--init_from=resume", "--max_iters=6"])
    assert "the run keeps n_layer = 4, n_head = 4, n_embd = 128, block_size = 64" in capsys.readouterr().err
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert load(run, training=True).step == 6
    message = refused(capsys, "train", "config/train_shakespeare_char.py", *short, "--init_from=resume", "--block_size=32")
    assert "for a shorter context start a new run from its weights" in message

    (workplace / "prompt.txt").write_text("What is 3 and")
    main(["sample", "--out_dir=out-shakespeare-char", "--start=FILE:prompt.txt", "--num_samples=1", "--max_new_tokens=12"])
    first = capsys.readouterr().out
    assert first.startswith("What is 3 and")
    assert len(first) == len("What is 3 and") + 12 + 1
    main(["sample", "--out_dir=out-shakespeare-char", "--device=cpu", "--start=What is 3 and", "--max_new_tokens=12"])
    ten = capsys.readouterr().out
    assert ten.count("What is 3 and") == 10
    assert first.strip() in ten, "nanoGPT's seed, 1337, is taken, and the first sample does not depend on the others"
    rest = ["--max_new_tokens=5", "--temperature=0.5", "--top_k=None", "--seed=1", "--dtype=float32", "--compile=True"]
    main(["sample", "--out_dir=out-shakespeare-char", "--start='A rose'", "--num_samples=2", *rest])
    captured = capsys.readouterr()
    assert captured.out.count("\nA rose") == 2
    assert "compile = True: ignored; sampling is not compiled" in captured.err


def test_a_new_run_does_not_overwrite_an_existing_run(workplace, capsys):
    argv = ["train", *README_CPU, *SHORTER, "--n_layer=1", "--n_embd=8", "--n_head=1", "--max_iters=2"]
    main(argv)
    before = snapshot(workplace / "out-shakespeare-char")
    capsys.readouterr()
    assert "already contains a run" in refused(capsys, *argv)
    assert snapshot(workplace / "out-shakespeare-char") == before


def test_values_with_equal_signs_and_numbers_as_text(workplace, capsys):
    argv = ["train", *README_CPU, *SHORTER, "--n_layer=1", "--n_embd=8", "--n_head=1", "--learning_rate=1", "--grad_clip=1"]
    main([*argv, "--max_iters=2", "--out_dir=out=char"])
    assert (workplace / "out=char" / "config.toml").is_file()
    capsys.readouterr()
    main(["sample", "--out_dir=out=char", "--start=123", "--num_samples=1", "--max_new_tokens=3"])
    assert capsys.readouterr().out.startswith("123")
    message = refused(capsys, "sample", "--out_dir=out=char", "--start=a=b", "--num_samples=1")
    assert "character '='" in message  # the text has none: the whole value arrived


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rat = 5", "config/mine.py:1: learning_rat = 5: unknown key learning_rat (did you mean 'learning_rate'?)"),
        ("exec('x = 1')", "config/mine.py:1: exec('x = 1'): is not a setting"),
        ("batch_size = __import__('os').system('touch made')", "config/mine.py:1: batch_size = __import__"),
        ("from os import system", "config/mine.py:1: from os import system: is not a setting"),
    ],
)
def test_code_that_is_not_a_setting_is_reported_with_its_line(workplace, capsys, line, words):
    (workplace / "config" / "mine.py").write_text(line + "\n")
    assert words in refused(capsys, "train", "config/mine.py")
    assert not (workplace / "made").exists()


def test_unknown_flags_and_init_from_are_reported(workplace, capsys):
    assert "did you mean 'max_iters'?" in refused(capsys, "train", *README_CPU, "--max_iter=5")
    assert "init_from = 'gpt3': choose" in refused(capsys, "train", *README_CPU, "--init_from=gpt3")
    assert "--out_dir" in refused(capsys, "train", *README_CPU, "--init_from=resume", "--out_dir=nowhere")
    assert "temprature" in refused(capsys, "sample", "--out_dir=x", "--temprature=1")


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> Path:
    """A small model in place of the hub's GPT-2s."""
    from bardling.checkpoint import load as loading
    from bardling.checkpoint.contents import write_model

    folder = tmp_path_factory.mktemp("hub")
    tokenizer = build_tokenizer("char", [TEXT])
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=tokenizer.vocab_size)
    write_model(folder, config, GPT(config, seed=3).state_dict(), tokenizer)
    asked = []
    monkeypatch.setattr(loading, "fetch_model", lambda name: asked.append(name) or folder)
    monkeypatch.setattr(sys.modules[__name__], "ASKED", asked, raising=False)
    return folder


def test_the_gpt2_configurations(workplace, hub, capsys):
    flags = ["--device=cpu", "--compile=False", "--dataset=shakespeare_char"]
    main(["train", "config/eval_gpt2.py", *flags, "--eval_iters=2"])
    assert "val loss" in capsys.readouterr().out
    assert not (workplace / "out").exists(), "an evaluation leaves nothing behind"

    main(["train", "config/finetune_shakespeare.py", *flags, "--max_iters=2", "--eval_iters=2", "--dropout=0.1",
          "--gradient_accumulation_steps=4", "--log_interval=1"])  # fmt: skip
    run = workplace / "out-shakespeare"
    assert [record["lr"] for record in records(run, "train")] == [3e-5, 3e-5], "decay_lr = False is constant, from the start"
    started, ended = load_model(hub).state_dict(), load_model(run).state_dict()
    assert all(0 < (ended[name] - started[name]).abs().max() < 2e-4 for name in started), "it began with those weights"
    assert load(run).config.dropout == 0.1

    capsys.readouterr()
    main(["sample", "--init_from=gpt2-xl", "--start=What is 2 and 4? A rose, by any other name:", "--num_samples=5",
          "--max_new_tokens=10"])  # fmt: skip
    assert capsys.readouterr().out.count("What is 2 and 4? A rose, by any other name:") == 5
    assert sys.modules[__name__].ASKED == ["gpt2", "gpt2-xl", "gpt2-xl"]


def test_finetuning_gpt2_on_tokens_that_name_no_vocabulary(workplace, hub, capsys, monkeypatch):
    from bardling.checkpoint.contents import write_model
    from bardling.data.tokens import token_files as tokenfiles

    monkeypatch.setattr(tokenfiles, "gpt2_tokenizer", lambda: None)  # as on a machine that has never fetched GPT-2
    filler = "".join(map(chr, range(0x100, 0x100 + 50257 - len(set(TEXT)))))
    tokenizer = build_tokenizer("char", [TEXT + filler])
    assert tokenizer.vocab_size == 50257
    config = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=50257)
    write_model(hub, config, GPT(config, seed=3).state_dict(), tokenizer)
    flags = ["--device=cpu", "--compile=False", "--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=1"]
    main(["train", "config/finetune_shakespeare.py", *flags])
    run = workplace / "out-shakespeare"
    assert load(run).config.vocab_size == 50257
    assert records(run, "val")[-1]["bits_per_byte"] > 0, "GPT-2's tokenizer has been taken along"
    main(["train", "config/finetune_shakespeare.py", *flags, "--max_iters=3", "--init_from=resume"])
    main(["train", "config/finetune_shakespeare.py", *flags, "--max_iters=4", "--init_from=resume"])
    assert records(run, "val")[-1]["step"] == 4
    main(["sample", "--out_dir=out-shakespeare", "--start=What", "--num_samples=1", "--max_new_tokens=2"])
    np.array([1, 50300, 2] * 20, np.uint16).tofile(workplace / "data" / "shakespeare" / "val.bin")
    message = refused(capsys, "train", "config/finetune_shakespeare.py", *flags, "--out_dir=other")
    assert "val.bin: token 1 is 50300, outside the vocabulary of 50,257" in message


def test_the_benchmark(workplace, capsys, monkeypatch):
    from bardling.cli import bench as command

    asked = []
    monkeypatch.setattr(command, "main", asked.append)
    main(["bench", "--batch_size=2", "--block_size=16", "--bias=True", "--device=cpu", "--compile=False", "--seed=3"])
    main(["bench", "--real_data=False", "--profile=True"])
    first, second = asked
    model = first.config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.bias) == (12, 12, 768, 16, True)
    assert (model.padded_vocab_size, model.gelu, first.config.seed) == (50304, "erf", 3)
    assert (first.config.train.batch_size, first.config.optim.lr, first.config.optim.weight_decay) == (2, 1e-4, 1e-2)
    assert (first.steps, first.warmup, first.data, first.profile) == (20, 10, "real", None)
    assert (second.data, second.profile, second.config.model.block_size) == ("random", Path("bench_log"), 1024)
    assert "unknown key" in refused(capsys, "bench", "--batch_size=2", "--batchsize=2")
    monkeypatch.undo()
    monkeypatch.chdir(workplace)

    from bardling.tools.bench import bench

    config = dataclasses.replace(first.config, model=dataclasses.replace(model, n_layer=1, n_head=1, n_embd=8))
    assert bench(config, steps=1, warmup=1, data="real").tokens_per_second > 0
    (workplace / "data" / "openwebtext" / "train.bin").unlink()
    assert nanogpt_options(["--device=cpu"]).data == "random"
    assert "using random tokens instead" in capsys.readouterr().err


def test_the_multi_gpu_command_translates_completely(workplace, capsys):
    main(["migrate", "config/train_gpt2.py", "--wandb_log=False"])
    recipe = capsys.readouterr().out
    for line in ("batch_size = 480", "micro_batch = 12", "steps = 600000", "block_size = 1024", "every = 1000"):
        assert line in recipe
    (workplace / "mine.toml").write_text(recipe)
    main(["train", "mine.toml", "--out", "runs/mine", "--device", "cpu", "--train.steps", "2", "--train.batch_size", "2",
          "--train.micro_batch", "1", "--optim.decay_steps", "2", "--optim.warmup_steps", "1", "--model.block_size", "8",
          "--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "8", "--eval.windows", "2"])  # fmt: skip
    assert len(records(workplace / "runs" / "mine", "val")) == 1


def test_torchrun_with_two_processes(workplace):
    argv = [*README_CPU, *SHORTER, "--n_layer=1", "--n_embd=16", "--gradient_accumulation_steps=2", "--backend=gloo"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bardling", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *argv, "--out_dir=two"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("steps are done") == 1, "one process prints"
    main(["train", *argv, "--out_dir=one"])
    for kind in ("train", "val"):
        one, two = records(workplace / "one", kind), records(workplace / "two", kind)
        assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-5)
    assert records(workplace / "two", "train")[-1]["tokens"] == 4 * 2 * 12 * 64, "accumulation counts all processes"
