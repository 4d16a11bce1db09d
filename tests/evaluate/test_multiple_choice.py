"""Multiple choice: scores against a plain computation, one ending at a time; shares of several processes; stops."""

import contextlib
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.distributed import TCPStore

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.distributed.context import Context, distributed
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.loss import Interrupted
from bardling.evaluate.multiple_choice import ChoiceResult, ItemScore, evaluate_choices
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
        assert [score.choice("sum"), score.choice("tokens"), score.choice("characters")] == choices
        right = [count + (choice == item.label) for count, choice in zip(right, choices, strict=True)]
    assert [result.correct("sum"), result.correct("tokens"), result.correct("characters")] == right
    assert len(set(right)) > 1, "the ways of counting are told apart by these items"
    assert (result.total, result.accuracy("tokens")) == (32, right[1] / 32)
    assert result.stderr("tokens") == pytest.approx(math.sqrt(result.accuracy("tokens") * (1 - result.accuracy("tokens")) / 32))
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
    assert abs(result.accuracy("sum") - 0.25) < 4 * result.stderr("sum")
    assert abs(result.accuracy("tokens") - 0.25) < 4 * result.stderr("tokens")


def test_contexts_are_computed_once_and_padding_is_small(model, byte_tokenizer, monkeypatch):
    shapes = []
    forward = GPT.forward
    spy = lambda self, tokens, *rest, **more: shapes.append(tokens.shape) or forward(self, tokens, *rest, **more)  # noqa: E731
    monkeypatch.setattr(GPT, "forward", spy)
    items = make_items(300)[2:]
    evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=2000)
    assert all(rows * (before + after) <= 2000 for (_, before), (rows, after) in zip(shapes[::2], shapes[1::2], strict=True))
    computed = sum(rows * width for rows, width in shapes)
    endings = sum(max(len(ending.encode()) for ending in item.endings) * len(item.endings) for item in items)
    contexts = sum(len(item.context.encode()) for item in items)
    assert computed < 1.2 * (endings + contexts)
    separately = sum(len(f"{item.context} {ending}".encode()) for item in items for ending in item.endings)
    assert computed < separately


def test_progress_is_reported_and_a_stop_request_is_obeyed(model, byte_tokenizer):
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


def test_a_diverged_model_gets_no_item_right(model, byte_tokenizer):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    result = evaluate_choices(model, byte_tokenizer, make_items(), precision=FLOAT32)
    assert (result.correct("sum"), result.correct("tokens"), result.correct("characters")) == (0, 0, 0)
    assert ItemScore("1", 0, (1.0, math.inf), (1, 1), (1, 1)).choice("sum") == -1


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


def test_what_cannot_be_measured_raises_a_user_error(model, byte_tokenizer):
    with pytest.raises(UserError, match="no items"):
        evaluate_choices(model, byte_tokenizer, [], precision=FLOAT32)
    small = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=100))
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model only 100"):
        evaluate_choices(small, byte_tokenizer, make_items(), precision=FLOAT32)
    items = [ChoiceItem("ab", ("b", "a"), 0, "1"), ChoiceItem("ab", ("b", "ç"), 0, "17")]
    with pytest.raises(UserError, match="hellaswag, item 17: character 'ç'"):
        evaluate_choices(model, build_tokenizer("char", ["ab "]), items, precision=FLOAT32, task="hellaswag")


@pytest.mark.parametrize("contexts", [True, False])
def test_every_process_makes_the_same_forward_passes(model, byte_tokenizer, contexts):
    """Also one that has no batch in a turn, or whose batch has no contexts while another's has."""
    items = [ChoiceItem("a man", ("falls", "climbs"), 0, "0"), ChoiceItem("x", ("falls", "y"), 1, "1")]
    tables = []
    for rank in range(3):
        context = SimpleNamespace(data_rank=rank, data_size=3, device=torch.device("cpu"), any=bool, largest=lambda _: 4)

        def exchange(found):
            if found.dtype == torch.int64:  # whether any process has contexts in each turn
                return found.fill_(contexts)
            tables.append(found)
            return found

        context.sum, passes = exchange, []
        with model.register_forward_pre_hook(lambda _, inputs, passes=passes: passes.append(inputs[0].shape)):
            evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, context=context)
        own_context = rank == 0 and not contexts  # it always computes its own contexts
        assert len(passes) == 4 * (1 + contexts) + own_context
    alone = evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=1)
    losses = sum(tables[::2])[0]
    assert losses.tolist() == [list(item.losses) for item in alone.items], "the results are bitwise equal"


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
    for measure in ("sum", "tokens", "characters"):
        assert (two.correct(measure), two.accuracy(measure)) == (one.correct(measure), one.accuracy(measure))
    assert (two.cut_contexts, two.cut_endings) == (one.cut_contexts, one.cut_endings)
    for first, second in zip(one.items, two.items, strict=True):
        assert (first.id, first.choice("sum"), first.choice("tokens")) == (
            second.id,
            second.choice("sum"),
            second.choice("tokens"),
        )
        assert first.losses == pytest.approx(second.losses, rel=1e-5)
    assert lone.items[0].losses == pytest.approx(one.items[0].losses, rel=1e-5), "one process may be left without an item"
    # What goes wrong in one process ends all of them, and so does a request to stop.
    messages = [told, other[2]]
    assert sorted("item strange: character 'ç'" in message for message in messages) == [False, True]
    assert sorted("another process could not encode its items" in message for message in messages) == [False, True]
    assert all(message.endswith("interrupted") for message in messages)


# ---- scores and statistics ----


def scored(plain, per_token, per_character):
    """An item with two endings and label 0; each flag says whether that way of scoring picks the right ending."""
    right, wrong = (4, 1), (1, 4)  # lengths that outweigh the difference between the losses
    losses = (1.0, 2.0) if plain else (2.0, 1.0)
    return ItemScore("item", 0, losses, right if per_token else wrong, right if per_character else wrong)


def test_statistics_are_reported_for_each_way_of_scoring():
    items = (
        scored(True, True, True),
        scored(False, True, True),
        scored(False, False, True),
        scored(False, False, False),
    )
    result = ChoiceResult("task", items, cut_contexts=0, cut_endings=0, seconds=8.0)
    assert (result.correct("sum"), result.correct("tokens"), result.correct("characters")) == (1, 2, 3)
    assert (result.accuracy("sum"), result.accuracy("tokens"), result.accuracy("characters")) == (0.25, 0.5, 0.75)
    expected = [math.sqrt(p * (1 - p) / 4) for p in (0.25, 0.5, 0.75)]
    assert [result.stderr("sum"), result.stderr("tokens"), result.stderr("characters")] == pytest.approx(expected)


@pytest.mark.parametrize(("seconds", "speed"), [(8.0, 0.5), (0.5, 8.0)])
def test_speed_is_items_per_second(seconds, speed):
    result = ChoiceResult("task", (scored(True, True, True),) * 4, cut_contexts=0, cut_endings=0, seconds=seconds)
    assert result.items_per_second == pytest.approx(speed)


def test_speed_is_finite_when_the_clock_has_not_advanced():
    result = ChoiceResult("task", (scored(True, True, True),), cut_contexts=0, cut_endings=0, seconds=0.0)
    assert 0 < result.items_per_second < math.inf


def test_seconds_is_the_duration_of_the_call(model, byte_tokenizer):
    before = time.monotonic()
    result = evaluate_choices(model, byte_tokenizer, make_items(2), precision=FLOAT32)
    assert 0 < result.seconds <= time.monotonic() - before


def test_the_shortest_endings_are_normalized_by_their_length():
    one_or_two = ItemScore("1", 0, losses=(2.0, 3.0), tokens=(1, 2), characters=(1, 2))
    assert (one_or_two.choice("sum"), one_or_two.choice("tokens"), one_or_two.choice("characters")) == (0, 1, 1)
    # An empty ending still has the token of its leading space; its loss counts as that of one character.
    empty = ItemScore("2", 0, losses=(1.0, 4.0), tokens=(1, 9), characters=(0, 8))
    assert (empty.choice("sum"), empty.choice("tokens"), empty.choice("characters")) == (0, 1, 1)


# ---- block size, batches and progress ----


def sized_item(context, *endings):
    """An item with the given number of byte tokens in the context and in each ending (its leading space included)."""
    return ChoiceItem("c" * context, tuple("e" * (length - 1) for length in endings), 0, f"{context}, {endings}")


@contextlib.contextmanager
def token_shapes(model):
    """Collect the shape (rows, width) of every tensor of token ids that the model embeds."""
    shapes = []
    with model.transformer.wte.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))):
        yield shapes


@pytest.mark.parametrize(("length", "cut"), [(BLOCK_SIZE, 0), (BLOCK_SIZE + 1, 1)])
def test_an_ending_that_just_fits_is_not_cut(model, byte_tokenizer, length, cut):
    item = sized_item(1, length, 5)
    result = evaluate_choices(model, byte_tokenizer, [item], precision=FLOAT32)
    assert (result.cut_contexts, result.cut_endings) == (0, cut)
    assert result.items[0].tokens == (BLOCK_SIZE, 5)
    assert result.items[0].losses == pytest.approx([loss for loss, _ in reference(model, item)], rel=1e-4)


# The last token of a context is an input of the endings, so an item's width is len(context) - 1 + len(longest ending).
BATCHES = {
    "four rows of 14 tokens": ([(10, 5, 5)] * 4, 56, 2),
    "one token too few for two items": ([(10, 5, 5)] * 4, 55, 4),
    "a context and an ending of different items: four rows of 59 + 20": ([(5, 20, 20), (60, 10, 10)], 316, 1),
    "padding exceeds the limit": ([(5, 20, 20), (60, 10, 10)], 300, 2),
    "items that fill the block": ([(BLOCK_SIZE + 1 - 5, 5, 5)] * 2, 10_000, 1),
    "padding exceeds the block": ([(10, 60, 60), (60, 10, 10)], 10_000, 2),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_takes_as_many_items_as_its_limits_allow(model, byte_tokenizer, name):
    sizes, batch_tokens, expected = BATCHES[name]
    batches = []
    result = evaluate_choices(
        model,
        byte_tokenizer,
        [sized_item(*size) for size in sizes],
        precision=FLOAT32,
        batch_tokens=batch_tokens,
        progress=lambda *done: batches.append(done),
    )
    assert len(batches) == expected, "progress is reported once per batch"
    assert (result.cut_contexts, result.cut_endings) == (0, 0)


def test_items_with_contexts_of_equal_length_share_a_batch(model, byte_tokenizer):
    # By total length, the two short contexts lie between the two long ones.
    long, short = [sized_item(38, 31, 4), sized_item(38, 31, 2)], sized_item(10, 31, 31)
    with token_shapes(model) as shapes:
        evaluate_choices(model, byte_tokenizer, [long[0], short, short, long[1]], precision=FLOAT32, batch_tokens=4 * (37 + 31))
    assert sorted(shapes) == sorted([(2, 37), (4, 31), (2, 9), (4, 31)]), "contexts are not padded"


def test_the_longest_endings_come_first_and_the_rest_in_mixed_order(model, byte_tokenizer):
    items = [sized_item(1, length, length) for length in range(2, 22)]
    with token_shapes(model) as shapes:
        evaluate_choices(model, byte_tokenizer, items, precision=FLOAT32, batch_tokens=1)
    widths = [width for _, width in shapes]
    assert sorted(widths) == list(range(2, 22))
    assert widths[0] == 21
    assert widths[1:] not in (sorted(widths[1:]), sorted(widths[1:], reverse=True)), "speed would drift with length"


def test_progress_counts_items(model, byte_tokenizer):
    seen = []
    evaluate_choices(
        model,
        byte_tokenizer,
        make_items(5),
        precision=FLOAT32,
        batch_tokens=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 7) for done in range(1, 8)]


# ---- several processes, with threads in their place ----


class Exchange:
    """Hands every thread the values of all threads."""

    def __init__(self, size):
        self.values = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def __call__(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadContext(Context):
    """A context whose collectives run between threads."""

    def __init__(self, rank, exchange):
        super().__init__(rank, len(exchange.values), torch.device("cpu"))
        object.__setattr__(self, "exchange", exchange)  # the base class is frozen

    def sum(self, tensor):
        return tensor.copy_(sum(self.exchange(self.rank, tensor.clone())))

    def largest(self, value):
        return max(self.exchange(self.rank, value))


def evaluate_in_threads(tokenizer, items, size):
    """Result, embedded token shapes and progress of each rank, with one item per batch."""
    exchange = Exchange(size)

    def run(rank):
        model, seen = make_model(), []
        options = {"precision": FLOAT32, "batch_tokens": 1, "progress": lambda *done: seen.append(done)}
        try:
            with token_shapes(model) as shapes:
                return evaluate_choices(model, tokenizer, items, context=ThreadContext(rank, exchange), **options), shapes, seen
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_processes_get_equal_amounts_of_work(byte_tokenizer):
    items = [sized_item(60, 6, 6), sized_item(20, 3, 3), sized_item(40, 20, 20), sized_item(10, 7, 7)]
    work = [sum(rows * width for rows, width in shapes) for _, shapes, _ in evaluate_in_threads(byte_tokenizer, items, 2)]
    assert max(work) < 1.2 * min(work)


def test_processes_with_unequal_shares_agree_and_scale_their_progress(byte_tokenizer):
    items = make_items(2)
    (first, _, most), (second, _, fewer), (third, _, few) = evaluate_in_threads(byte_tokenizer, items, 3)
    assert first == second == third
    assert (first.cut_contexts, first.cut_endings) == (2, 1)
    assert [score.losses for score in first.items] == [
        pytest.approx([loss for loss, _ in reference(make_model(), item)], rel=1e-4) for item in items
    ]
    assert most == [(2, 4), (4, 4)]
    assert fewer == few == [(3, 4), (4, 4)], "not complete until every process is"
