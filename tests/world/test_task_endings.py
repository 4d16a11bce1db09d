"""Endings of multiple-choice tasks: tokens and losses equal the language model evaluation harness's."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_tokenizers import library, lm_eval_pair, surround, write

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from bardling.distributed.device import Precision
from bardling.evaluate.multiple_choice import _encode, evaluate_choices
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.gpt import GPT

transformers = pytest.importorskip("transformers")

FLOAT32 = Precision("float32", "test", "cpu")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ITEMS = [
    ChoiceItem("the cat sat", ("on the mat", "under it"), 0, "plain"),
    ChoiceItem("a man walks. he", ("falls.", "is 'so' fast", "x"), 1, "three"),
    ChoiceItem("ends with spaces  ", ("on", "off on"), 0, "spaces"),
    ChoiceItem("ends with a line\n", ("on", "off on"), 0, "line"),
    ChoiceItem("", ("begins", "with nothing"), 1, "empty"),
    ChoiceItem("naïve 日本", ("é", "👍 ok"), 0, "unicode"),
    ChoiceItem("x" * 40, (" starts with a space", "ends with one "), 0, "long"),
]


def folder_of(path: Path, kind: str, start: bool, end: bool) -> Path:
    made = library(kind, seed=3)
    surround(made, ["<s>"] * start, ["</s>"] * end)
    return write(path, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("start", [False, True], ids=["plain", "with <s>"])
@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace", "unigram", "wordpiece"])
def test_losses_equal_those_of_a_model_that_reads_the_harness_tokens(tmp_path: Path, kind: str, start: bool) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, kind, start, False))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=256, vocab_size=tokenizer.vocab_size), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    for tokens in (1, 100_000):  # items alone, and all in one batch
        result = evaluate_choices(model, tokenizer, ITEMS, precision=FLOAT32, batch_tokens=tokens)
        for item, score in zip(ITEMS, result.items, strict=True):
            for loss, count, ending in zip(score.losses, score.tokens, item.endings, strict=True):
                context, continuation = lm_eval_pair(theirs, item.context, " " + ending)
                row = torch.tensor([context + continuation])
                with torch.no_grad():
                    logits = model(row[:, :-1])[0, len(context) - 1 :]
                expected = F.cross_entropy(logits.double(), row[0, len(context) :], reduction="sum").item()
                assert (count, loss) == (len(continuation), pytest.approx(expected, rel=1e-4))


def test_an_end_token_of_the_post_processor_is_neither_context_nor_ending(tmp_path: Path) -> None:
    both, only = (
        load_tokenizer(folder_of(tmp_path / "a", "llama", True, True)),
        load_tokenizer(folder_of(tmp_path / "b", "llama", True, False)),
    )
    assert (both.interface.end, only.interface.end) == ((2,), ())
    for first, second in zip(*(encoded(tokenizer) for tokenizer in (both, only)), strict=True):
        assert first == second


def encoded(tokenizer: Tokenizer) -> list[tuple[list[int], list[list[int]]]]:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=1024, vocab_size=tokenizer.vocab_size)
    items = _encode(tokenizer, ITEMS, range(len(ITEMS)), config, "task")
    return [(item.context.tolist(), [ending.tolist() for ending in item.endings]) for item in items]


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_tokenizers_of_our_own_encode_endings_as_before(spec: str) -> None:
    tokenizer = build_tokenizer(spec, ["the cat sat on the mat and ends with spaces on off " * 3])
    for item, (context, endings) in zip(ITEMS, encoded(tokenizer), strict=True):
        if item.context and item.context == item.context.rstrip():
            assert context == tokenizer.encode(item.context).tolist()
            assert endings == [tokenizer.encode(" " + ending).tolist() for ending in item.endings]


@pytest.mark.skipif(not (DATA / "hellaswag_val.jsonl.gz").is_file(), reason="needs HellaSwag's validation file")
def test_hellaswag_with_gpt2_tokens_is_encoded_as_before() -> None:
    tokenizer = load_tokenizer(DATA / "gpt2_tokenizer.json")
    with gzip.open(DATA / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 400)]
    items = [ChoiceItem(row["ctx"], tuple(row["endings"]), int(row["label"]), str(row["ind"])) for row in rows]
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=1024, vocab_size=50257)
    before = iter(tokenizer.encode_batch([text for item in items for text in (item.context, *(" " + e for e in item.endings))]))
    for item in _encode(tokenizer, items, range(len(items)), config, "hellaswag"):
        assert item.context.tolist() == next(before).tolist()
        assert [ending.tolist() for ending in item.endings] == [next(before).tolist() for _ in item.endings]


def fused_unknown(path: Path) -> Tokenizer:
    """A tokenizer that makes one token of neighbouring unknown characters, also across a space that it does not know."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    vocab = {"<unk>": 0, "a": 1, "b": 2, "<s>": 3}
    made = Library(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    return load_tokenizer(write(path, made, bos_token="<s>", unk_token="<unk>"))


def test_an_ending_that_vanishes_in_the_unknown_token_before_it_is_scored_alone(tmp_path: Path) -> None:
    tokenizer = fused_unknown(tmp_path)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=tokenizer.vocab_size)
    (item,) = _encode(tokenizer, [ChoiceItem("aé", ("éé", "ab"), 0, "unknown")], [0], config, "task")
    assert [ending.tolist() for ending in item.endings] == [[0], [1, 2]]
    assert item.context.tolist() == [1, 0]
