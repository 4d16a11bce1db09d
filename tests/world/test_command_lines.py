"""Command lines that look alike: options given twice, and `.py` files that are values and not nanoGPT configurations."""

import pytest

from bardling.cli.eval import EvalOptions
from bardling.cli.main import main
from bardling.cli.nanogpt import is_nanogpt
from bardling.cli.parse import parse
from bardling.cli.recipe import parse_recipe_command
from bardling.cli.sample import SampleOptions
from bardling.cli.train import TrainOptions
from bardling.errors import UserError
from bardling.interop.nanogpt_keys import BENCH_KEYS, SAMPLE_KEYS, TRAIN_KEYS


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--data.source a --data.source b", "--data.source is given twice ('a' and 'b'): give it once; to train on several"),
        ("--data.source=a --data.source=b", "--data.source is given twice ('a' and 'b')"),
        ("--data.source a --seed 3 --data.source=b", "--data.source is given twice ('a' and 'b')"),
        ("--seed 1 --seed 1", "--seed is given twice ('1' and '1'): give it once"),
        ("--train.micro-batch 1 --train.micro_batch 2", "--train.micro_batch is given twice"),
        ("--eval.tasks a --eval.tasks b", "--eval.tasks is given twice ('a' and 'b'): give it once; an option with several"),
        ("--optim.betas 0.9 0.95 --optim.betas 0.8 0.9", "--optim.betas is given twice"),
        ("--model.bias False --model.bias True", "--model.bias is given twice"),
        ("--out a --out b", "--out is given twice"),
        ("--compile off --compile on", "--compile is given twice"),
    ],
)
def test_a_repeated_option_is_refused(argv, says):
    with pytest.raises(UserError) as error:
        parse_recipe_command("train", TrainOptions, ["quickstart", *argv.split()], "Train.")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cls", "argv"),
    [
        (SampleOptions, "run --prompt a --prompt b"),
        (SampleOptions, "run --best --best"),
        (SampleOptions, "run --prompt-file a --prompt_file b"),
        (EvalOptions, "run --data a --data b"),
        (EvalOptions, "run --tasks a --tasks b"),
    ],
)
def test_other_commands_refuse_it_too(cls, argv):
    with pytest.raises(UserError, match="is given twice"):
        parse(cls, argv.split(), prog="x", description="x")


def test_values_and_similar_names_are_not_repetitions():
    options = parse(EvalOptions, ["run", "--tasks", "a", "a", "--data", "a"], prog="x", description="x")
    assert options.tasks == ("a", "a")
    assert parse(SampleOptions, ["run", "--prompt=--seed --seed", "--seed", "3"], prog="x", description="x").seed == 3


def test_a_repeated_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "quickstart", "--seed", "1", "--seed", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        "config/x.py",
        "config/x.py --device=cpu",
        "--device=cpu config/x.py",
        "--device=cpu --compile=False config/x.py --max_iters=3",
        "config/x.py config/y.py",
        "--max_iters=3 config/x.py config/y.py",
        "config/x.py --max_iters=3 config/y.py --lr_decay_iters=3",
        "--dataset=code.py --max_iters=3",
        "--max_iters=3",
        "--max_iters 3 config/x.py",  # an error of nanoGPT's form, which its reader explains
    ],
)
def test_nanogpts_own_forms(argv):
    assert is_nanogpt(argv.split(), TRAIN_KEYS)


@pytest.mark.parametrize(
    "argv",
    [
        "quickstart --data.source code.py",
        "quickstart --data.source=code.py",
        "quickstart --seed 3 --data.source code.py --device cpu",
        "quickstart --data.tokenizer tokenizer.py",
        "quickstart --out run.py",
        "quickstart --out=run.py",
        "quickstart --sample.prompt main.py",
        "quickstart --eval.tasks a.py b.py",
        "quickstart --model.init x.py",
        "--data.source code.py",
        "quickstart",
        "",
    ],
)
def test_a_value_that_ends_in_py_is_a_value(argv):
    assert not is_nanogpt(argv.split(), TRAIN_KEYS)
    assert not is_nanogpt(argv.split(), BENCH_KEYS)


@pytest.mark.parametrize(
    ("argv", "nanogpt"),
    [
        ("run --prompt_file x.py", False),
        ("run --prompt-file x.py --best", False),
        ("run --prompt x.py", False),
        ("run --prompt=x.py --seed 1", False),
        ("--prompt_file x.py run", False),
        ("config/sample.py", True),
        ("--out_dir=out config/sample.py", True),
        ("--out_dir=out --start=FILE:prompt.py", True),
        ("--num_samples=1 --start=x.py", True),
    ],
)
def test_sampling(argv, nanogpt):
    assert is_nanogpt(argv.split(), SAMPLE_KEYS) == nanogpt


def test_a_run_folder_that_ends_in_py_is_a_run(tmp_path):
    (tmp_path / "run.py").mkdir()
    assert not is_nanogpt([str(tmp_path / "run.py"), "--seed", "1"], SAMPLE_KEYS)


def test_a_source_file_of_python_is_trained_on(tmp_path, capsys):
    source = tmp_path / "code.py"
    source.write_text("def add(a, b):\n    return a + b\n\n" * 40)
    model = ["--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2", "--model.block_size=16", "--device=cpu"]
    steps = ["--train.steps=2", "--train.batch_size=2", "--optim.warmup_steps=1", "--data.tokenizer=char"]
    out = ["--out", str(tmp_path / "run"), "--sample.prompt", "def"]
    main(["train", "quickstart", "--data.source", str(source), *model, *steps, *out])
    capsys.readouterr()
    (tmp_path / "prompt.py").write_text("def add")
    prompt = ["--prompt_file", str(tmp_path / "prompt.py"), "--max_new_tokens", "2", "--seed", "0"]
    main(["sample", str(tmp_path / "run"), *prompt])
    assert capsys.readouterr().out.startswith("def add")
