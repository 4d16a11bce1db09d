"""Conversations as a source: rows of JSON Lines, or of a JSON array, in the layouts that people publish.

| layout | fields of a row |
| --- | --- |
| messages (OpenAI) | `messages`: a list of objects with `role` and `content` |
| ShareGPT | `conversations`: a list of objects with `from` (human, gpt, system) and `value` |
| alpaca | `instruction`, `output` and perhaps `input` |
| prompt and completion | `prompt` and `completion`, texts or lists of messages |

Each becomes a document whose text is the JSON of its messages, so documents are split and named as any others. A row that is
not a conversation (another layout, an unknown role, an empty turn, no answer) is left out, counted and named. A file in which
no row is one is refused.

Limits: a row has at most 16 MiB; a conversation has at most 10,000 turns and 2 million characters.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from bardling.data.text.fields import RowText, valid_text
from bardling.data.text.findings import Findings, describe_findings
from bardling.data.text.opening import Remote, opened
from bardling.data.text.rows import Table, TooLong, json_lines, json_values
from bardling.data.text.sources import Document, FileSource, open_source
from bardling.errors import UserError
from bardling.files.decoding import HEAD, MARK, byte_order_mark

Message = dict[str, str]

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
}
_LAYOUTS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"))
MAX_MESSAGES = 10_000
MAX_CHARACTERS = 2_000_000
"""Limits of a conversation: turns, and characters of all together."""
_LONGEST_ROW = 16 << 20  # bytes


class NotAConversation(ValueError):  # noqa: N818  not an error: the row is left out
    """Why a row is left out: a short noun phrase."""


def has_conversations(spec: str, encoding: str = "") -> bool:
    """Whether a source is a JSON file whose first row is a conversation and has no `text` to train on."""
    path = Path(spec).expanduser()
    if not path.is_file():
        return False
    try:
        _, row = next(_rows(path, encoding), (0, None))
    except UserError:  # reading it as text reports the fault
        return False
    return isinstance(row, dict) and "text" not in row and _layout(row) is not None


@dataclass(frozen=True)
class ConversationSource:
    """The conversations in files."""

    files: FileSource
    findings: Findings = dataclass_field(default_factory=Findings, compare=False)  # of the last pass over the documents

    @property
    def name(self) -> str:
        return self.files.name

    def documents(self) -> Iterator[Document]:
        """All conversations; a `UserError` if there are none, or naming the line that is not JSON."""
        self.findings.clear()
        found = False
        for path in self.files.files:
            label = self.files.label(path)
            for number, row in _rows(path, self.files.encoding):
                name = f"{label}:{number}"
                try:
                    messages = conversation(row)
                except NotAConversation as error:
                    self.findings.left_out(str(error), name)
                    continue
                found = True
                yield Document(name, json.dumps(messages, ensure_ascii=False))
        if not found:
            why = "; ".join(describe_findings(self.findings.facts())) or "empty"
            layouts = ", ".join(" and ".join(fields) for fields in _LAYOUTS)
            raise UserError(f"{self.files.root}: contains no conversations ({why}): write rows with the fields {layouts}")

    def identity(self) -> str:
        return self.files.identity()

    def size(self) -> int:
        return self.files.size()


def open_conversations(spec: str, encoding: str = "") -> ConversationSource:
    """The conversations of a file, folder or glob; `encoding` is that of files without a byte order mark."""
    return ConversationSource(open_source(spec, encoding))


def conversation(row: Any) -> list[Message]:
    """The messages of a row, with the roles system, user and assistant.

    Raises:
        NotAConversation: the row has another layout, or a conversation from which nothing can be learned.
    """
    if not isinstance(row, dict):
        raise NotAConversation("row that is not an object")
    layout = _layout(row)
    if layout == ("messages",):
        messages = _turns(row["messages"], "role", "content")
    elif layout == ("conversations",):
        messages = _turns(row["conversations"], "from", "value")
    elif layout == ("instruction", "output"):
        question, more = _text(row["instruction"]), row.get("input")
        if more:
            question = f"{question}\n\n{_text(more)}"
        messages = [_message("user", question), _message("assistant", row["output"])]
        if row.get("system"):
            messages.insert(0, _message("system", row["system"]))
    elif layout == ("prompt", "completion"):
        messages = _side(row["prompt"], "user") + _side(row["completion"], "assistant")
    else:
        raise NotAConversation("row without the fields of a conversation")
    if not any(message["role"] == "assistant" for message in messages):
        raise NotAConversation("conversation without an answer")
    if messages[0]["role"] == "assistant":
        raise NotAConversation("conversation that begins with an answer")
    if len(messages) > MAX_MESSAGES:
        raise NotAConversation(f"conversation of more than {MAX_MESSAGES:,} turns")
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise NotAConversation(f"conversation of more than {MAX_CHARACTERS:,} characters")
    return messages


def _layout(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    return next((fields for fields in _LAYOUTS if all(field in row for field in fields)), None)


def _side(value: Any, role: str) -> list[Message]:
    return _turns(value, "role", "content") if isinstance(value, list) else [_message(role, value)]


def _turns(values: Any, role: str, content: str) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise NotAConversation("conversation that is not a list of turns")
    messages = []
    for value in values:
        if not isinstance(value, dict) or content not in value:
            raise NotAConversation(f"turn without {role!r} and {content!r}")
        messages.append(_message(value.get(role), value[content]))
    return messages


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or role not in _ROLES:
        raise NotAConversation("turn with an unknown role")
    text = _text(content)
    if not text.strip():
        raise NotAConversation("empty turn")
    return {"role": _ROLES[role], "content": text}


def _text(content: Any) -> str:
    """The text of a turn, which may be a list of text parts."""
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in content):
            content = "\n".join(content)
    if not isinstance(content, str):
        raise NotAConversation("turn that is not text")
    return valid_text(content)


def _rows(file: Path | Remote, encoding: str) -> Iterator[tuple[int, Any]]:
    """Number, counted from 1, and content of each row of a file: lines, or the elements of an array."""
    with opened(file) as (stream, _):
        head = stream.peek(HEAD)
        encoding = byte_order_mark(head)[0] or encoding or "utf-8"
        array = head.decode(encoding, "ignore").lstrip(MARK).lstrip().startswith("[")
        rows = json_values if array else json_lines
        for number, row in rows(Table(stream, str(file), RowText(), "", encoding, longest=_LONGEST_ROW)):
            if isinstance(row, TooLong):
                fault = f"line {number} is longer than {_LONGEST_ROW >> 20} MiB"
                raise UserError(f"{file}: {fault}: is this a JSON Lines file?")
            yield number, row
