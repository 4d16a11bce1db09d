"""Finetuning on conversations: only answers are learned, each conversation by itself, and a run stays exact."""

import itertools
import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F

from bardling.checkpoint.load import load, load_tokenizer_of
from bardling.checkpoint.run_folder import open_run
from bardling.config.recipes import config_to_toml
from bardling.data.batches.loader import TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.tokens.chat_template import chat_prompt_ids
from bardling.data.tokens.chatml import with_chatml
from bardling.data.tokens.conversations import ANSWER, BEGIN
from bardling.data.tokens.dataset import open_recorded
from bardling.errors import UserError
from bardling.generation.engine import Engine
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling
from bardling.training.objective import NextToken
from bardling.training.run import resume, train


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    draw = random.Random(0)
    rows = []
    for _ in range(240):
        word = draw.choice(["red", "blue", "green"])
        turns = [("user", f"say {word}"), ("assistant", word)] * draw.randint(1, 2)
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def recipe(tiny, change, chats):
    return change(
        tiny,
        data={"source": str(chats), "tokenizer": "byte", "chat_template": "chatml"},
        model={"block_size": 96, "dropout": 0.0},
        train={"steps": 12, "batch_size": 4, "micro_batch": 2},
        eval={"every": 6},
        checkpoint={"every": 4, "keep_last": 5},
        sample={"every": 6, "num_samples": 2, "max_new_tokens": 4},
    )


def open_split(run):
    folder = open_run(run)
    return open_recorded(folder.config().data, folder.dataset_record(), run).split("train")


def test_a_model_learns_answers_from_a_pretrained_one(tiny, change, recipe, tmp_path):
    base = change(tiny, data={"tokenizer": "byte"}, model={"block_size": 96, "n_embd": 64}, train={"steps": 4})
    train(base, tmp_path / "base", quiet=True)
    config = change(recipe, data={"tokenizer": "byte"}, model={"init": str(tmp_path / "base")}, train={"steps": 60})
    config = change(config, optim={"lr": 1e-2, "warmup_steps": 5, "decay_steps": 60})
    train(config, tmp_path / "chat", quiet=True)
    losses = [record["loss"] for record in records(tmp_path / "chat", "val")]
    assert losses[-1] < 0.5 * losses[0]
    old, new = load(tmp_path / "base"), load(tmp_path / "chat")
    assert new.config.vocab_size == old.config.vocab_size + 3
    tokenizer = load_tokenizer_of(tmp_path / "chat")
    assert tokenizer.interface.chat_template
    samples = [json.loads(line) for line in (tmp_path / "chat" / "samples.jsonl").read_text().splitlines()]
    assert all(record["prompt"].startswith("<|im_start|>user\nsay ") for record in samples)
    assert {record["step"] for record in samples} == {6 * number for number in range(1, 11)}
    engine = Engine(new.build(), tokenizer)
    prompt = chat_prompt_ids(tokenizer, [{"role": "user", "content": "say green"}])
    engine.submit(Request(tuple(prompt), Sampling(12, temperature=0.0)))
    outputs = []
    while engine.running or engine.waiting:
        outputs += engine.step()
    assert outputs[-1].finish == "stop"  # it has learned to end its turn


def test_new_tokens_begin_as_the_mean_of_the_others(tiny, change, recipe, tmp_path):
    base = change(tiny, data={"tokenizer": "byte"}, model={"block_size": 96}, train={"steps": 2})
    train(base, tmp_path / "base", quiet=True)
    loaded = load(tmp_path / "base")
    start = loaded.extended(with_chatml(loaded.tokenizer))
    table = start.state["transformer.wte.weight"]
    assert table.shape[0] == start.config.padded_vocab_size
    torch.testing.assert_close(table[257:260], table[:257].mean(0).expand(3, -1))
    assert not table[260:].any()
    start.build()


def test_masked_tokens_have_no_gradient_and_conversations_are_apart(recipe, tmp_path):
    train(recipe, tmp_path / "run", quiet=True)
    model, split = load(tmp_path / "run").build(), open_split(tmp_path / "run")
    order = SequenceOrder(0, len(split), 96, split.row)
    batch = TrainSequences(split, order).batch(0, 3)

    embedded = []
    hook = model.transformer.wte.register_forward_hook(lambda _, __, out: embedded.append(out) or out.retain_grad())
    objective = NextToken()
    objective(model, batch).loss.backward()
    hook.remove()
    after = torch.zeros_like(batch.targets, dtype=torch.bool)  # whether a later token of the conversation is learned
    starts = order.starts(0, 3).tolist()
    total, count = 0.0, 0
    for row, start in enumerate(starts):
        ids = torch.from_numpy(split.read(start, split.row))
        marks = torch.from_numpy(split.marks.read(start, split.row))
        begins = [*torch.nonzero(marks & BEGIN)[:, 0].tolist(), split.row]
        for begin, end in itertools.pairwise(begins):
            learned = (marks[begin + 1 : end] & ANSWER).bool()
            after[row, begin : begin + int(learned.nonzero().max()) + 1] = True
            with torch.no_grad():  # each conversation by itself, from position 0
                logits = model(ids[begin : end - 1][None])[0]
                losses = F.cross_entropy(logits, ids[begin + 1 : end], reduction="none")
            total, count = total + float(losses[learned].sum()), count + int(learned.sum())
    assert count == int(objective.denominator(batch)) > 0
    assert total == pytest.approx(float(objective(model, batch).loss.detach()), rel=1e-4)
    gradient = embedded[0].grad.abs().sum(-1)  # [B, T]
    assert (gradient[~after] == 0).all()
    assert (gradient[after] > 0).all()
    assert (~after).any()


def test_a_stopped_run_of_conversations_resumes_bitwise(recipe, tmp_path, weights, stopped_at, chats, bardling):
    train(recipe, tmp_path / "whole", quiet=True)
    copy = stopped_at(4, tmp_path / "whole", tmp_path / "copy")
    resume(copy, quiet=True)
    assert weights(copy, 12) == weights(tmp_path / "whole", 12)
    assert bardling("info", copy, "--step", "3").returncode == 0
    shown = bardling("eval", copy, "--precision", "float32", "--windows", "8")
    assert shown.returncode == 0, shown.stderr
    last = records(tmp_path / "whole", "val")[-1]
    assert f"{last['loss']:.4f} nats" in shown.stdout


def test_two_processes_learn_conversations_as_one(recipe, tmp_path, torchrun):
    (tmp_path / "two.toml").write_text(config_to_toml(recipe))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "ask it something: bardling chat" in done.stdout
    train(recipe, tmp_path / "one", quiet=True)
    for kind in ("train", "val"):
        one, two = ([record["loss"] for record in records(tmp_path / name, kind)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"chat_template": ""}, "need a model's chat template"),
        ("data", {"tokenizer": "char"}, "is made from text"),
        ("data", {"tokenizer": "bpe:300"}, "is made from text"),
        ("train", {"context_start": 24}, "packed for the whole context"),
        ("data", {"source": "stdlib", "format": "chat"}, "are read from JSON files, not from stdlib"),
        ("model", {"block_size": 4}, "has an answer in a row of 5 tokens"),
    ],
)
def test_settings_that_do_not_suit_conversations_are_refused(recipe, change, tmp_path, section, values, message):
    with pytest.raises(UserError, match=message):
        train(change(recipe, **{section: values}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_other_conversations_are_not_the_data_of_a_run(recipe, change, tmp_path):
    train(recipe, tmp_path / "run", quiet=True)
    for values in ({"too_long": "drop"}, {"format": "text"}):
        with pytest.raises(UserError, match=f"data.{next(iter(values))}"):
            resume(tmp_path / "run", change(open_run(tmp_path / "run").config(), data=values), quiet=True)
    shutil.rmtree(tmp_path / "run")
