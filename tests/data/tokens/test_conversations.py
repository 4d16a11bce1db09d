"""Conversations: the layouts that are read, what is left out, and the tokens, marks and rows that they become."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bardling.config import DataConfig
from bardling.data.batches.loader import EvalSequences, TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.text.conversations import NotAConversation, conversation, has_conversations, open_conversations
from bardling.data.tokens.chatml import END, START, TEMPLATE, with_chatml
from bardling.data.tokens.conversations import ANSWER, BEGIN, ConversationEncoder, Marked, Packer, Rows
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.text_interface import TextFiles
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from bardling.errors import UserError
from chat_models import FORMATS

QUESTION = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chatml(build_tokenizer("byte", ()))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def dialogues(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "messages": [
                {"role": role, "content": f"{number} " + "x" * draw.randrange(30)}
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ]
        }
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QUESTION},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one?"}]}, QUESTION[1]], "id": 3},
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]},
        {"instruction": "one?", "input": "", "output": "two"},
        {"prompt": "one?", "completion": "two"},
        {"prompt": [QUESTION[0]], "completion": [QUESTION[1]]},
    ],
)
def test_layouts_become_the_same_messages(row: dict[str, Any], tmp_path: Path) -> None:
    assert conversation(row) == QUESTION
    assert has_conversations(str(write(tmp_path / "rows.jsonl", [row])))


def test_systems_and_inputs_are_kept() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "You add."}
    assert [message["content"] for message in conversation(row)] == ["You add.", "Add.\n\n1 2", "3"]
    assert (
        conversation({"conversations": [{"from": "system", "value": "s"}, *[{"from": "gpt", "value": "a"}]]})[0]["role"]
        == "system"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({}, "without the fields"),
        ({"messages": "hello"}, "not a list of turns"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": ["hello"]}, "turn without 'role'"),
        ({"messages": [{"role": "user"}]}, "turn without 'role'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ({"messages": [{"content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": " "}, QUESTION[1]]}, "empty turn"),
        ({"messages": [QUESTION[0], {"role": "assistant", "content": None}]}, "not text"),
        ({"messages": [QUESTION[0], {"role": "assistant", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [QUESTION[0]]}, "without an answer"),
        ({"messages": [QUESTION[1]]}, "begins with an answer"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "turn without 'from'"),
        ({"instruction": "a", "output": ""}, "empty turn"),
        ({"instruction": 3, "output": "a"}, "not text"),
        ({"prompt": "a", "completion": {"text": "b"}}, "not text"),
    ],
)
def test_rows_that_teach_nothing_are_named(row: Any, reason: str) -> None:
    with pytest.raises(NotAConversation, match=reason):
        conversation(row)


def test_files_are_lines_arrays_or_gzip_and_bad_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": QUESTION}, {"messages": []}, {"messages": QUESTION}]
    lines, array, packed = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.jsonl.gz"
    write(lines, rows)
    array.write_text(json.dumps(rows, indent=2))
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for path in (lines, array, packed):
        source = open_conversations(str(path))
        assert [json.loads(document.text) for document in source.documents()] == [QUESTION] * 2
        found = source.findings.facts()["left_out"]
        assert found == {"conversation that is not a list of turns": {"count": 1, "names": [f"{path.name}:2"]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": []}', "contains no conversations"),
        (b'{"messages": [}', "line 1 is not JSON"),
        (b'{"messages": 1}\n\xff\xfe{', "line 2 is not JSON"),
        (b"[{]", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"messages": ' + b"[" * 100_000, "line 1 is not JSON"),
        (b"[1, 2]", "contains no conversations"),
    ],
)
def test_files_that_are_no_conversations_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(open_conversations(str(path)).documents())
    assert "\n" not in str(caught.value)


def test_rows_with_text_stay_text(tmp_path: Path) -> None:
    assert not has_conversations(str(write(tmp_path / "a.jsonl", [{"text": "a", "messages": QUESTION}])))
    assert not has_conversations(str(write(tmp_path / "b.jsonl", [{"story": "a"}])))
    assert not has_conversations("stdlib")


def answers(marked: Marked, tokenizer: Tokenizer) -> list[str]:
    """The runs of answer tokens as text."""
    texts, run = [], list[int]()
    for token, mark in zip([*marked.ids.tolist(), 0], [*(marked.marks & ANSWER).tolist(), 0], strict=True):
        if mark:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def test_answers_are_what_the_template_marks(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        *QUESTION,
        {"role": "user", "content": "é?"},
        {"role": "assistant", "content": "ö!"},
    ]
    with ConversationEncoder(tokenizer) as encoder:
        marked = encoder.encode("a", messages)
    assert answers(marked, tokenizer) == [f"two{END}", f"ö!{END}"]
    assert tokenizer.decode(marked.ids.tolist()).count(START) == 5
    assert np.flatnonzero(marked.marks & BEGIN).tolist() == [0]


@pytest.mark.parametrize("name", ["gemma", "llama3", "mistral"])
def test_without_marks_answers_follow_the_generation_prompt(name: str, tokenizer: Tokenizer) -> None:
    """Of the usual templates, an answer is its text and the token that ends the turn."""
    template, special = FORMATS[name]
    assert "endgeneration" not in template
    files = TextFiles(config={"eos_token": special[-1], "bos_token": START}, template=template)
    plain = Tokenizer(dict(tokenizer.content), "test", None, files)
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "three"}]
    with ConversationEncoder(plain) as encoder:
        marked = encoder.encode("a", [*QUESTION, *more])
    first, second = answers(marked, plain)
    assert first.strip().startswith("two")
    assert second.strip().startswith("three")
    assert first.strip().removeprefix("two") == second.strip().removeprefix("three") != ""


def test_marks_equal_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == TEMPLATE
    with ConversationEncoder(load_tokenizer(tmp_path)) as encoder:
        for row in dialogues(20):
            expected = theirs.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
            marked = encoder.encode("a", row["messages"])
            assert marked.ids.tolist() == expected["input_ids"]
            assert (marked.marks & ANSWER).tolist() == expected["assistant_masks"]


def test_chatml_adds_its_tokens_after_the_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = build_tokenizer("byte", ())
    assert tokenizer.extends(plain)
    assert tokenizer.vocab_size == plain.vocab_size + 3
    assert tokenizer.interface.eos == (258, 256)  # a text may still end as in pretraining
    assert tokenizer.encode("a<|im_end|>").tolist() == [97, *b"<|im_end|>"]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.interface.eos, again.interface.chat_template) == (
        tokenizer.fingerprint,
        tokenizer.interface.eos,
        TEMPLATE,
    )
    assert with_chatml(again).fingerprint == again.fingerprint


def test_whole_conversations_fill_rows(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    conversations = [
        Marked(str(number), np.full(length, number + 300), np.array([BEGIN, *[ANSWER] * (length - 1)]))
        for number, length in enumerate(draw.choices(range(2, 50), k=900))
    ]
    packer = Packer(Rows(64), pad=259)
    rows = [row for each in conversations for row in packer.add(each)] + list(packer.finish())
    assert sorted(int(part.name) for row in rows for part in row) == list(range(900))
    tokens = sum(len(each.ids) for each in conversations)
    assert tokens > 0.97 * 64 * len(rows)  # waste
    for row in rows:
        ids, marks = np.concatenate([part.ids for part in row]), np.concatenate([part.marks for part in row])
        assert len(ids) == len(marks) == 64
        assert np.count_nonzero(marks & BEGIN) == len(row)
        assert set(ids.tolist()) - {259} == {int(part.name) + 300 for part in row}
        assert not marks[ids == 259].any()


def test_too_long_conversations_are_cut_or_left_out() -> None:
    def marked(length: int, answer: int) -> Marked:
        return Marked(
            "a", np.arange(length), np.array([BEGIN if i == 0 else ANSWER if i >= answer else 0 for i in range(length)])
        )

    cutting, dropping = Packer(Rows(10), pad=0), Packer(Rows(10, "drop"), pad=0)
    (row,) = cutting.add(marked(15, 5))
    assert row[0].ids.tolist() == list(range(10))
    assert list(cutting.add(marked(15, 12))) == []  # no answer is left
    assert list(dropping.add(marked(15, 5))) == []
    assert (cutting.cut, cutting.without_answer, dropping.dropped) == (2, 1, 1)
    assert list(cutting.finish()) == []


@pytest.fixture(scope="module")
def prepared(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save(folder)
    source = write(folder / "rows.jsonl", [*dialogues(300), {"messages": []}])
    return DataConfig(str(source), str(folder / "tokenizer.json"), cache=str(folder / "cache"))


def test_a_dataset_of_conversations_gives_masked_targets_and_documents(prepared: DataConfig) -> None:
    dataset = open_data(prepared, context=127)
    assert dataset.verify() == []
    assert dataset.manifest.source["left_out"]["conversation that is not a list of turns"]["count"] == 1
    split = dataset.split("train")
    order = SequenceOrder(1, len(split), 127, split.row)
    assert sorted(order.starts(0, order.sequences_per_epoch).tolist()) == list(range(0, len(split), 128))
    batch = TrainSequences(split, order).batch(0, 4)
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        learned = targets != -100
        assert learned.any()
        assert (targets[learned] != 259).all()
        text = tokenizer.decode(targets[learned].tolist())
        assert START not in text
        assert END in text
        assert inputs[0] == 257  # a row begins with a conversation
    assert batch.documents is not None
    assert (batch.inputs.flatten()[batch.documents[batch.documents < 4 * 127].long()] == 257).all()
    held = EvalSequences(dataset.split("val"), 127, None)
    assert held.n == len(dataset.split("val")) // 128
    assert int((held.batch(0, held.n).targets != -100).sum()) > 0
    assert open_data(prepared, context=127).path == dataset.path
    assert open_data(prepared, context=63).path != dataset.path


def test_what_conversations_need_is_said(tmp_path: Path, prepared: DataConfig) -> None:
    plain = DataConfig(prepared.source, "byte", cache=prepared.cache)
    with pytest.raises(UserError, match=r"needs? a model's chat template|need a model's chat template"):
        open_data(plain, context=63)
    build_tokenizer("byte", ()).save(tmp_path)
    with pytest.raises(UserError, match=r"has no chat template .*--data\.chat_template chatml"):
        open_data(DataConfig(prepared.source, str(tmp_path / "tokenizer.json"), cache=prepared.cache), context=63)
    one = write(tmp_path / "one.jsonl", [{"messages": QUESTION}])
    with pytest.raises(UserError, match="a single conversation"):
        open_data(DataConfig(str(one), prepared.tokenizer, cache=prepared.cache), context=63)
    with pytest.raises(UserError, match="no conversation of the training split has an answer in a row of 5 tokens"):
        open_data(prepared, context=4)
