"""A tokenizer with more tokens than the model has rows is usable; only a token that is out of range is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import added, library, write

from bardling.checkpoint.load import load
from bardling.checkpoint.run_folder import open_run
from bardling.cli.eval import run as eval_command
from bardling.cli.sample import run as sample_command
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.multiple_choice import evaluate_choices
from bardling.evaluate.tasks import ChoiceItem
from bardling.training.run import resume, train

transformers = pytest.importorskip("transformers")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose tokenizer got a padding token and a word after training."""
    made = library("llama")
    rows = made.get_vocab_size()
    added(made, ("<pad>", True), ("covid", False))
    folder = write(tmp_path / "model", made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes = {"vocab_size": rows, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assert load(folder).config.vocab_size == rows
    return folder


def test_it_samples_and_answers(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_command([str(source), "--prompt", "the cat", "--max_new_tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the cat")
    with pytest.raises(UserError, match="outside the vocabulary"):
        sample_command([str(source), "--prompt", "the covid", "--max_new_tokens", "5", "--device", "cpu"])
    loaded, precision = load(source), Precision("float32", "test", "cpu")
    items = [ChoiceItem("the cat", ("sat", "ran"), 0, "1"), ChoiceItem("the", ("covid", "ran"), 0, "2")]
    assert loaded.tokenizer is not None
    assert evaluate_choices(loaded.build(), loaded.tokenizer, items[:1], precision=precision).total == 1
    with pytest.raises(UserError, match=r"item 2: token .* is out of range"):
        evaluate_choices(loaded.build(), loaded.tokenizer, items, precision=precision)


@pytest.mark.parametrize("last", ["the end", "the covid"])
def test_it_is_evaluated_and_finetuned(source: Path, tmp_path: Path, tiny: Any, change: Any, last: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 100 + last)
    config = change(
        tiny,
        data={"source": str(text), "tokenizer": str(source / "tokenizer.json")},
        model={"init": str(source)},
        optim={"warmup_steps": 0},
        train={"steps": 2},
        sample={"every": 0},
    )
    if last == "the covid":
        with pytest.raises(UserError, match="outside the vocabulary"):
            eval_command([str(source), "--data", str(text), "--device", "cpu"])
        with pytest.raises(UserError, match="outside the vocabulary"):
            train(config, tmp_path / "run", quiet=True)
        return
    eval_command([str(source), "--data", str(text), "--device", "cpu"])
    train(config, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", change(open_run(tmp_path / "run").config(), train={"steps": 3}), quiet=True)
    step = tmp_path / "run" / "checkpoints" / "step-000003"
    assert json.loads((step / "config.json").read_text())["vocab_size"] == load(source).config.vocab_size
