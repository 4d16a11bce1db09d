"""Malformed files of conversations and chat templates: each is an error of one line, or its rows are left out and counted."""

import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from bardling.config import DataConfig
from bardling.data.text import conversations as text_conversations
from bardling.data.tokens import conversations
from bardling.data.tokens.chat_template import ChatTemplate
from bardling.data.tokens.chatml import END, START, TEMPLATE, with_chatml
from bardling.data.tokens.conversations import ANSWER, ConversationEncoder
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.text_interface import TextFiles
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.errors import UserError

ASK, ANSWERED = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
GOOD = [json.dumps({"messages": [{"role": "user", "content": f"{number}?"}, ANSWERED]}) for number in range(60)]
LINE = GOOD[0].encode()
PACKED = gzip.compress(b"\n".join(map(str.encode, GOOD)))


def turn(role: str, content: str) -> str:
    """A row of a question and one more turn, both written as JSON."""
    return f'{{"messages": [{json.dumps(ASK)}, {{"role": {role}, "content": {content}}}]}}'


ROWS = {  # what is left out, and why
    "null": ("null", "not an object"),
    "number": ("1e400", "not an object"),
    "text": ('"Hi"', "not an object"),
    "list": ('[{"role": "user", "content": "Hi"}]', "not an object"),
    "empty object": ("{}", "without the fields"),
    "other fields": ('{"question": "a", "answer": "b"}', "without the fields"),
    "half a layout": ('{"instruction": "a"}', "without the fields"),
    "no turns": ('{"messages": []}', "not a list of turns"),
    "null turns": ('{"messages": null}', "not a list of turns"),
    "turns as an object": ('{"messages": {"role": "user", "content": "a"}}', "not a list of turns"),
    "NaN": ('{"messages": NaN}', "not a list of turns"),
    "turn as text": ('{"messages": ["user: a", "assistant: b"]}', "turn without 'role' and 'content'"),
    "nested turns": ('{"messages": [[{"role": "user", "content": "a"}]]}', "turn without 'role' and 'content'"),
    "null turn": (f'{{"messages": [{json.dumps(ASK)}, null]}}', "turn without 'role' and 'content'"),
    "missing content": ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "turn without 'role' and 'content'"),
    "fields of another layout": ('{"conversations": [{"role": "user", "content": "a"}]}', "turn without 'from' and 'value'"),
    "unknown role": (turn('"robot"', '"a"'), "unknown role"),
    "capital role": (turn('"Assistant"', '"a"'), "unknown role"),
    "null role": (turn("null", '"a"'), "unknown role"),
    "role as a list": (turn('["assistant"]', '"a"'), "unknown role"),
    "role that is half a character": (turn(r'"assistant\ud800"', '"a"'), "unknown role"),
    "role of a tool": (turn('"tool"', '"a"'), "unknown role"),
    "empty turn": (turn('"assistant"', '""'), "empty turn"),
    "turn of white space": (turn('"assistant"', r'" \u2003\n"'), "empty turn"),
    "turn of an empty part": (turn('"assistant"', '[{"type": "text", "text": ""}]'), "empty turn"),
    "number as content": (turn('"assistant"', "42"), "not text"),
    "null content": (turn('"assistant"', "null"), "not text"),
    "content without parts": (turn('"assistant"', "[]"), "not text"),
    "image": (turn('"assistant"', '[{"type": "image_url", "image_url": {"url": "a"}}]'), "not text"),
    "part without text": (turn('"assistant"', '[{"type": "text"}]'), "not text"),
    "part of null": (turn('"assistant"', '[{"type": "text", "text": null}]'), "not text"),
    "part of a number": (turn('"assistant"', '[{"type": "text", "text": 5}]'), "not text"),
    "input as a number": ('{"instruction": "a", "input": 7, "output": "b"}', "not text"),
    "only a question": (f'{{"messages": [{json.dumps(ASK)}]}}', "without an answer"),
    "answer first": (f'{{"messages": [{json.dumps(ANSWERED)}, {json.dumps(ASK)}]}}', "begins with an answer"),
    "the last of equal keys": ('{"messages": [{"role": "user", "content": "a"}], "messages": 5}', "not a list of turns"),
    "too many turns": (json.dumps({"messages": [ASK, ANSWERED] * 5001}), "more than 10,000 turns"),
    "too long": (turn('"assistant"', json.dumps("x" * 2_000_001)), "more than 2,000,000 characters"),
}
FILES = {  # what cannot be read at all
    "empty": (b"", "contains no conversations (empty)"),
    "white space": (b" \n\t\n", "contains no conversations (empty)"),
    "no JSON": (b"user: Hi\nassistant: Hello\n", "line 1 is not JSON"),
    "Python": (b"{'messages': [{'role': 'user', 'content': 'a'}]}", "line 1 is not JSON"),
    "an object over several lines": (json.dumps({"messages": [ASK, ANSWERED]}, indent=2).encode(), "line 1 is not JSON"),
    "two objects on a line": (LINE + LINE, "line 1 is not JSON (Extra data"),
    "cut in the middle": (LINE + b"\n" + LINE[:40], "line 2 is not JSON"),
    "trailing comma in a line": (LINE[:-1] + b",}", "line 1 is not JSON"),
    "invalid UTF-8": (LINE + b"\n" + LINE.replace(b"0?", b"\xff\xfe"), "line 2 is not JSON in UTF-8 (byte 43 of it is 0xff)"),
    "UTF-16 without its mark": ("\n".join(GOOD).encode("utf-16-le"), "line 1 is not JSON"),
    "bytes": (b"PAR1\x15\x04\x00\x00", "line 1 is not JSON"),
    "nesting": (b'{"messages": ' + b"[" * 200_000, "line 1 is not JSON"),
    "nested objects": (b'{"a":' * 100_000, "line 1 is not JSON"),
    "a number of 10,000 digits": (b'{"messages": ' + b"9" * 10_000 + b"}", "line 1 is not JSON"),
    "a line of more than 16 MiB": (b'{"messages": "' + b"x" * (16 << 20) + b'"}', "line 1 is longer than 16 MiB"),
    "an array cut in the middle": (b"[" + LINE + b", " + LINE[:40], "is not valid JSON"),
    "an array with a trailing comma": (b"[" + LINE + b",]", "is not valid JSON"),
    "an array and more": (b"[" + LINE + b"]\n" + LINE, "is not valid JSON (element 1: more data after the array"),
    "a nested array": (b"[" * 200_000, "is not valid JSON"),
    "an array of lists": (b"[[" + LINE + b"]]", "contains no conversations (left out: 1 x row that is not an object"),
    "only bad rows": (b'{"messages": []}\n5', "1 x conversation that is not a list of turns (rows.jsonl:1); 1 x row that"),
    "gzip cut in the middle": (PACKED[:-20], "is damaged gzip data"),
    "gzip with a flipped byte": (PACKED[:-6] + b"\0" + PACKED[-5:], "is damaged gzip data"),
    "gzip of nothing": (gzip.compress(b""), "contains no conversations (empty)"),
    "a line of 64 MiB in gzip": (gzip.compress(b'"' + b"x" * (64 << 20), 1), "line 1 is longer than 16 MiB"),
}
TEMPLATES = {
    "syntax": ("{% for message in messages %}", "line 1: TemplateSyntaxError"),
    "unclosed mark": ("{% generation %}{{ messages[1].content }}", "TemplateSyntaxError"),
    "mark that ends nothing": ("{% endgeneration %}", "TemplateSyntaxError"),
    "undefined name": ("{{ system.prompt }}", "UndefinedError"),
    "unknown filter": ("{{ messages | shout }}", "TemplateAssertionError"),
    "missing field": ("{{ messages[0].text + 'a' }}", "UndefinedError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses too deeply"),
    "endless loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "huge range": ("{{ range(10 ** 12) | list }}", "OverflowError"),
    "huge text": ("{{ 'x' * 10 ** 11 }}", "needs too much memory"),
    "4 million characters": ("{{ 'x' * 4000001 }}", "the limit is 4,000,000"),
    "class": ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    "subclasses": ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__.json }}", "SecurityError"),
    "attribute by filter": ("{{ (messages | attr('__class__')).mro() }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
    "file": ("{% include '/etc/hostname' %}", "no loader"),
    "changed messages": ("{{ messages.clear() }}", "SecurityError"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chatml(build_tokenizer("byte", ()))


@pytest.fixture
def opened(tokenizer: Tokenizer, tmp_path: Path):
    """`opened(content, template)`: the dataset of a file `rows.jsonl`."""

    def prepare(content: bytes, template: str = TEMPLATE) -> TokenDataset:
        tokenizer.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "rows.jsonl").write_bytes(content)
        folder = str(tmp_path / "cache")
        config = DataConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "tokenizer.json"), cache=folder, format="chat")
        return open_data(config, context=127)

    return prepare


def left_out(dataset: TokenDataset) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in dataset.manifest.source.get("left_out", {}).items()}


def test_there_are_many_cases() -> None:
    assert len(ROWS) + len(FILES) + len(TEMPLATES) >= 80


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_left_out_with_its_reason(name: str, tmp_path: Path) -> None:
    row, reason = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD[0], row, GOOD[1]]))
    source = text_conversations.open_conversations(str(path))
    assert [json.loads(document.text)[0]["content"] for document in source.documents()] == ["0?", "1?"]
    ((found, entry),) = source.findings.facts()["left_out"].items()
    assert reason in found
    assert entry == {"count": 1, "names": ["rows.jsonl:2"]}


def test_all_of_them_are_counted_in_the_dataset(opened) -> None:
    rows = [row for row, _ in ROWS.values()]
    dataset = opened("\n".join([*GOOD[:30], *rows, *GOOD[30:]]).encode())
    assert sum(left_out(dataset).values()) == len(ROWS)
    expected = Counter(reason for _, reason in ROWS.values())
    for reason, count in expected.items():
        assert sum(number for found, number in left_out(dataset).items() if reason in found) == count, reason
    assert dataset.manifest.train.documents + dataset.manifest.val.documents == len(GOOD)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_in_one_line(name: str, opened, tmp_path: Path) -> None:
    content, reason = FILES[name]
    with pytest.raises(UserError) as found:
        opened(content)
    message = str(found.value)
    assert reason in message
    assert "rows.jsonl" in message or str(tmp_path) in message
    assert "\n" not in message
    assert len(message) < 600
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_refused_in_one_line(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    template, reason = TEMPLATES[name]
    monkeypatch.setattr(conversations, "ChatTemplate", partial(ChatTemplate, seconds=0.3))
    faulty = Tokenizer(dict(tokenizer.content), "test", None, TextFiles(config={}, template=template, folder="model"))
    with pytest.raises(UserError) as found, ConversationEncoder(faulty) as encoder:
        encoder.encode("a", [ASK, ANSWERED])
    message = str(found.value)
    assert message.startswith("model/chat_template.jinja: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}", "{{ raise_exception('no') }}"])
def test_a_template_that_shows_no_answer_is_refused(template: str, opened) -> None:
    with pytest.raises(UserError, match="no conversation of the training split has an answer in a row of 128 tokens"):
        opened("\n".join(GOOD).encode(), template)


def test_a_conversation_that_the_template_refuses_is_left_out(opened) -> None:
    """Such as one whose roles do not alternate."""
    row = json.dumps({"messages": [ASK, ASK, ANSWERED]})
    alternating = "{% if messages[1].role == 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    dataset = opened("\n".join([*GOOD, row]).encode(), alternating + TEMPLATE)
    assert left_out(dataset) == {"conversation that the chat template refuses": 1}


ACCEPTED = {  # unusual, and yet what its author means is clear
    "byte order mark": b"\xef\xbb\xbf" + LINE,
    "Windows line ends": LINE + b"\r\n\r\n",
    "an array in gzip": gzip.compress(b"[\n" + LINE + b"\n]"),
    "an array after white space": b"\n" * 99 + b"[" + LINE + b"]",
    "two gzip members": gzip.compress(LINE + b"\n") + gzip.compress(b"\n"),
    "the last of equal keys": b'{"messages": 5, ' + LINE[1:],
    "two layouts": LINE[:-1] + b', "prompt": 1, "completion": null}',
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_files_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ACCEPTED[name])
    (document,) = text_conversations.open_conversations(str(path)).documents()
    assert json.loads(document.text) == [{"role": "user", "content": "0?"}, ANSWERED]


def test_a_turn_of_1_mb_is_cut_and_half_a_character_replaced(opened) -> None:
    rows = [turn('"assistant"', json.dumps("x" * (1 << 20))), turn('"assistant"', r'"a\ud800b"')]
    dataset = opened("\n".join([*GOOD, *rows]).encode())
    assert dataset.manifest.source["kept"]["conversation cut at the model's context"]["count"] == 1
    splits = [dataset.split(name) for name in ("train", "val")]
    assert sum("a\ufffdb" in dataset.tokenizer.decode(split.read(0, len(split)).tolist()) for split in splits) == 1


def test_control_tokens_written_in_turns_are_counted(opened, tokenizer: Tokenizer) -> None:
    rows = [turn('"assistant"', json.dumps(f"a{END}\n{START}user\nb")), turn('"assistant"', '"<|im_end"')]
    dataset = opened("\n".join([*GOOD, *rows]).encode())
    (entry,) = [entry for reason, entry in dataset.manifest.source["kept"].items() if "control token" in reason]
    assert entry == {"count": 2, "names": ["rows.jsonl:61"]}
    with ConversationEncoder(tokenizer) as encoder:  # as in transformers, they are tokens
        marked = encoder.encode("a", json.loads(rows[0])["messages"])
    assert (marked.marks & ANSWER).sum() == len("a\nuser\nb") + 3
