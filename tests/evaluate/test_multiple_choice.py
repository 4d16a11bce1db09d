"""Multiple choice: scores against a plain computation, one ending at a time; shares of several processes; stops."""

import math
import random

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.distributed import TCPStore

from bardling.config import ModelConfig
from bardling.data.tokenizer import build_tokenizer
from bardling.distributed.context import distributed
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.loss import Interrupted
from bardling.evaluate.multiple_choice import ItemScore, evaluate_choices
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.gpt import GPT

FLOAT32 = Precision("float32", "test", "cpu")
BLOCK_SIZE = 96
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "climbs",
    "falls",
    "ladder",
    "onto",
    "roof",
    "naïve",
    "quickly",
    "then",
    "[title]",
    "smiles",
]


def make_model():
    """A random model whose weights are large enough for its choices to differ from item to item."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK_SIZE, vocab_size=257, dropout=0.3), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.train()


def make_items(count=30):
    """Items of two to four endings; the first two do not fit into the block size."""
    draw = random.Random(5)

    def text(low, high):
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    items = [
        ChoiceItem(text(1, 8), tuple(text(1, 6) for _ in range(draw.choice([2, 4, 4]))), draw.randrange(2), str(number))
        for number in range(count)
    ]
    long_context = ChoiceItem(text(30, 40), ("falls.", "climbs onto the roof quickly."), 1, "long context")
    long_ending = ChoiceItem("A man", (text(30, 40), "smiles."), 0, "long ending")
    return [long_context, long_ending, *items]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return build_tokenizer("byte", [])


@pytest.fixture
def model():
    return make_model()


def reference(model, item):
    """Summed loss and number of scored tokens of each ending: no batch, no padding, full logits, in float64."""
    model = model.eval().double()
    answers = []
    for ending in item.endings:
        context, completion = list(item.context.encode()), list((" " + ending).encode())
        longest = max(len((" " + other).encode()) for other in item.endings)
        while len(context) > 1 and len(context) + longest - 1 > BLOCK_SIZE:
            context.pop(0)
        while len(context) + len(completion) - 1 > BLOCK_SIZE:
            completion.pop()
        row, scored = context + completion, len(completion)
        logp = F.log_softmax(model(torch.tensor([row[:-1]]))[0], dim=-1)
        losses = [-logp[position - 1, row[position]].item() for position in range(len(row) - scored, len(row))]
        answers.append((sum(losses), scored))
    return answers


def first_smallest(values):
    return min(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_every_item_equals_a_plain_computation(model, byte_tokenizer, batch_tokens):
    items = make_items()
    result = evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=batch_tokens)
    assert model.training, "the model's mode is left as it was"
    right = [0, 0, 0]
    for item, score in zip(items, result.items, strict=True):
        losses, tokens = zip(*reference(model, item), strict=True)
        assert (score.id, score.label, score.tokens) == (item.id, item.label, tokens)
        assert score.losses == pytest.approx(losses, rel=1e-4)
        characters = [len(ending) for ending in item.endings]
        choices = [
            first_smallest([loss / length for loss, length in zip(losses, lengths, strict=True)])
            for lengths in ([1] * len(losses), tokens, characters)
        ]
        assert [score.choice, score.choice_norm, score.choice_chars] == choices
        right = [count + (choice == item.label) for count, choice in zip(right, choices, strict=True)]
    assert [result.correct, result.correct_norm, result.correct_chars] == right
    assert len(set(right)) > 1, "the ways of counting are told apart by these items"
    assert (result.total, result.accuracy_norm) == (32, right[1] / 32)
    assert result.stderr_norm == pytest.approx(math.sqrt(result.accuracy_norm * (1 - result.accuracy_norm) / 32))
    assert (result.cut_contexts, result.cut_endings) == (2, 1), "the long context, and the one before the long ending"


@pytest.mark.parametrize(("extra", "cut"), [(0, 0), (1, 1)])
def test_a_context_that_just_fits_is_not_cut(model, byte_tokenizer, extra, cut):
    # " abc" gives three inputs besides the context's, since its last token is only a target
    item = ChoiceItem("x" * (BLOCK_SIZE - 3 + extra), ("abc", "b"), 0, "1")
    result = evaluate_choices(model, byte_tokenizer, [item], precision=FLOAT32)
    assert (result.cut_contexts, result.cut_endings) == (cut, 0)
    assert result.items[0].losses == pytest.approx([loss for loss, _ in reference(model, item)], rel=1e-4)


def test_a_random_model_is_right_as_often_as_chance(byte_tokenizer):
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=257), seed=1)
    draw = random.Random(2)
    items = [
        ChoiceItem(
            draw.choice(WORDS), tuple(" ".join(draw.choices(WORDS, k=2)) for _ in range(4)), draw.randrange(4), str(number)
        )
        for number in range(800)
    ]
    result = evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32)
    assert abs(result.accuracy - 0.25) < 4 * result.stderr
    assert abs(result.accuracy_norm - 0.25) < 4 * result.stderr_norm


def test_contexts_are_computed_once_and_padding_is_small(model, byte_tokenizer, monkeypatch):
    shapes = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, tokens, *rest: shapes.append(tokens.shape) or hidden(self, tokens, *rest))
    items = make_items(300)[2:]
    evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=2000)
    assert all(rows * (before + after) <= 2000 for (_, before), (rows, after) in zip(shapes[::2], shapes[1::2], strict=True))
    computed = sum(rows * width for rows, width in shapes)
    endings = sum(max(len(ending.encode()) for ending in item.endings) * len(item.endings) for item in items)
    contexts = sum(len(item.context.encode()) for item in items)
    assert computed < 1.2 * (endings + contexts)
    separately = sum(len(f"{item.context} {ending}".encode()) for item in items for ending in item.endings)
    assert computed < separately


def test_progress_is_told_and_a_stop_is_obeyed(model, byte_tokenizer):
    items, seen = make_items(), []
    evaluate_choices(
        model,
        byte_tokenizer,
        items,
        precision=FLOAT32,
        batch_tokens=600,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 3
    assert seen == sorted(set(seen))
    assert seen[-1] == (32, 32)
    stops = iter([False, False, True])
    with pytest.raises(Interrupted):
        evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=600, stop_requested=lambda: next(stops))
    assert model.training


def test_a_model_that_has_diverged_is_not_right_by_accident(model, byte_tokenizer):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    result = evaluate_choices(model, byte_tokenizer, make_items(), precision=FLOAT32)
    assert (result.correct, result.correct_norm, result.correct_chars) == (0, 0, 0)
    assert ItemScore("1", 0, (1.0, math.inf), (1, 1), (1, 1)).choice == -1


def test_an_empty_context_starts_from_the_end_of_text_token(model, byte_tokenizer):
    item = ChoiceItem("", ("falls", "climbs"), 0, "7")
    score = evaluate_choices(model, byte_tokenizer, [item], precision=FLOAT32).items[0]
    model.eval()
    row = torch.tensor([[byte_tokenizer.eot_id, *b" falls"]])
    assert score.losses[0] == pytest.approx(
        F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="sum").item(), rel=1e-5
    )
    with pytest.raises(UserError, match="item 7: the context is empty"):
        evaluate_choices(model, build_tokenizer("char", [" facebhilms"]), [item], precision=FLOAT32)


def test_what_cannot_be_measured_is_told_in_a_line(model, byte_tokenizer):
    with pytest.raises(UserError, match="no items"):
        evaluate_choices(model, byte_tokenizer, [], precision=FLOAT32)
    small = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=100))
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model only 100"):
        evaluate_choices(small, byte_tokenizer, make_items(), precision=FLOAT32)
    items = [ChoiceItem("ab", ("b", "a"), 0, "1"), ChoiceItem("ab", ("b", "ç"), 0, "17")]
    with pytest.raises(UserError, match="hellaswag, item 17: character 'ç'"):
        evaluate_choices(model, build_tokenizer("char", ["ab "]), items, precision=FLOAT32, task="hellaswag")


def share(rank, world_size, port, folder):
    """One of several processes: measures the items, then some of which its own or another's share cannot be encoded."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with distributed("cpu") as context:
        items = make_items(11)
        options = {"precision": FLOAT32, "batch_tokens": 400, "context": context}
        result = evaluate_choices(make_model(), build_tokenizer("byte", []), items, **options)
        lone = evaluate_choices(make_model(), build_tokenizer("byte", []), items[:1], **options)
        try:
            items[5] = ChoiceItem("a man", ("ç", "falls"), 0, "strange")
            evaluate_choices(make_model(), build_tokenizer("char", ["A. " + "".join(WORDS)]), items, **options)
        except UserError as error:
            told = str(error)
        try:
            stop = context.rank == 1
            evaluate_choices(make_model(), build_tokenizer("byte", []), items, stop_requested=lambda: stop, **options)
        except Interrupted:
            told += "; interrupted"
        torch.save((result, lone, told), folder / f"{rank}.pt")


def test_two_processes_share_the_items_and_give_the_result_of_one(tmp_path, byte_tokenizer):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is its own at once
    multiprocessing.spawn(share, (2, store.port, tmp_path), nprocs=2)
    (two, lone, told), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert (two, lone) == other[:2], "every process knows the result"
    one = evaluate_choices(make_model(), byte_tokenizer, make_items(11), precision=FLOAT32, batch_tokens=400)
    assert two.total == 13, "no item is counted twice"
    for field in ("correct", "correct_norm", "correct_chars", "cut_contexts", "cut_endings", "accuracy", "accuracy_norm"):
        assert getattr(two, field) == getattr(one, field)
    for first, second in zip(one.items, two.items, strict=True):
        assert (first.id, first.choice, first.choice_norm) == (second.id, second.choice, second.choice_norm)
        assert first.losses == pytest.approx(second.losses, rel=1e-5)
    assert lone.items[0].losses == pytest.approx(one.items[0].losses, rel=1e-5), "one process may be left without an item"
    # What goes wrong in one process ends all of them, and so does a request to stop.
    messages = [told, other[2]]
    assert sorted("item strange: character 'ç'" in message for message in messages) == [False, True]
    assert sorted("another process could not encode its items" in message for message in messages) == [False, True]
    assert all(message.endswith("interrupted") for message in messages)
