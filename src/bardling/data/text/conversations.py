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

Limits: a JSON array is read into memory as a whole, up to 256 MiB; a line has at most 16 MiB; a conversation has at most
10,000 turns and 2 million characters.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from bardling.data.text.findings import Findings, describe_findings
from bardling.data.text.formats import row_lines
from bardling.data.text.sources import Document, FileSource, open_source, valid_text
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import MARK

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
_MAX_ARRAY_BYTES = 256 << 20
_MAX_LINE_BYTES = 16 << 20
_GZIP = b"\x1f\x8b"


class NotAConversation(ValueError):  # noqa: N818  not an error: the row is left out
    """Why a row is left out: a short noun phrase."""


def has_conversations(spec: str) -> bool:
    """Whether a source is a JSON file whose first row is a conversation and has no `text` to train on."""
    path = Path(spec).expanduser()
    if not path.is_file():
        return False
    try:
        _, row = next(_rows(path), (0, None))
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
            label = path.relative_to(self.files.root).as_posix()
            for number, row in _rows(path):
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


def open_conversations(spec: str) -> ConversationSource:
    """The conversations of a file, folder or glob."""
    source = open_source(spec)
    assert isinstance(source, FileSource)
    return ConversationSource(source)


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


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, counted from 1, and content of each row of a file: lines, or the elements of an array."""
    with os_error_as_user_error(path, "read"), path.open("rb") as file:
        gzipped = file.read(2) == _GZIP
    lines = row_lines(path, gzipped, "utf-8", _MAX_LINE_BYTES + 1)
    start = (line.removeprefix(b"\xef\xbb\xbf").lstrip() for line in row_lines(path, gzipped, "utf-8", 64))
    if next(filter(None, start), b"").startswith(b"["):
        yield from enumerate(_array(path, lines), 1)
        return
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_LINE_BYTES:
            raise UserError(f"{path}: line {number} is longer than {_MAX_LINE_BYTES >> 20} MiB: is this a JSON Lines file?")
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode().lstrip(MARK))
        except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: line {number} is not JSON ({reason}): each line must be one JSON object") from None


def _array(path: Path, lines: Iterable[bytes]) -> list[Any]:
    data = bytearray()
    for line in lines:
        data += line
        if len(data) > _MAX_ARRAY_BYTES:
            remedy = "write one object per line (JSON Lines)"
            raise UserError(f"{path}: a JSON array may have at most {_MAX_ARRAY_BYTES >> 20} MiB: {remedy}")
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({' '.join(str(error).split())[:120]}): correct the array") from None
    return list(rows)
