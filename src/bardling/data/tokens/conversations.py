"""Conversations as tokens: rendered by the model's chat template, with the answers marked, packed into rows of equal length.

Marks. Each token has a number: 1 (`ANSWER`) if it belongs to an answer, so that the loss covers answers only; plus 2 (`BEGIN`)
if a conversation begins with it, so that conversations in one row do not attend to one another. Answers are what the template
puts between `{% generation %}` and `{% endgeneration %}`. Without these tags, an answer is what the template adds for the turn
of the assistant after its generation prompt, up to the last token that is not white space.

Packing. A row has `length` tokens: the inputs of one sequence, and the last target. Conversations are never split: each goes
into the fullest of the open rows in which it fits (best fit; the fullest row is closed when too many are open), and the rest of
a row is padding. One that is longer than a row is cut at its end, or left out (`too_long`); either is counted.

Limits: the order of rows is that of closing, which the data order shuffles.
"""

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from bardling.data.tokens.chat_template import ChatTemplate
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

ANSWER, BEGIN = 1, 2
_OPEN_ROWS = 256

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """How conversations become rows."""

    length: int  # tokens of a row: the model's context, and one more
    too_long: Literal["truncate", "drop"] = "truncate"


class Marked(NamedTuple):
    """A conversation as tokens."""

    name: str
    ids: Ids  # [tokens]
    marks: Ids  # [tokens]


class ConversationEncoder:
    """Renders and tokenizes conversations; a context manager that ends the process which renders.

    Raises:
        UserError: the tokenizer has no chat template, or cannot have tokens for it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.kind == "char":
            raise UserError(
                "data.tokenizer = 'char': cannot mark the turns of a conversation; use byte, gpt2 or a tokenizer.json"
            )
        if tokenizer.interface.chat_template is None:
            remedy = "set --data.chat_template chatml, or start from a model that has a chat template"
            raise UserError(f"{tokenizer.name}: has no chat template for the conversations: {remedy}")
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer.interface)
        self._has_marks = "endgeneration" in tokenizer.interface.chat_template

    def __enter__(self) -> "ConversationEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._template.close()

    def encode(self, name: str, messages: Sequence[Mapping[str, Any]]) -> Marked:
        """The tokens of a conversation; no mark is `ANSWER` if the template does not show where its answers are."""
        if self._has_marks:
            text, spans = self._template.render_with_spans(messages)
        else:
            text = self._template.render(messages, add_generation_prompt=False)
            spans = self._answers(messages, text)
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        marks = np.zeros(len(ids), np.int64)
        for begin, end in spans:
            marks[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = ANSWER
        if len(marks):
            marks[0] |= BEGIN
        return Marked(name, ids, marks)

    def control_tokens_in(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """How many control tokens the texts of messages spell, such as the token that ends a turn."""
        return sum(self._tokenizer.control_tokens_in(message["content"]).total() for message in messages)

    def _answers(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[int, int]]:
        """Where the answers are in the text, from texts of the conversation up to and after each."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template.render(messages[:number], add_generation_prompt=True) if number else ""
            after = self._template.render(messages[: number + 1], add_generation_prompt=False)
            # Some templates show earlier answers in another form, or say nothing of their own after a prompt.
            if text.startswith(before) and text.startswith(after.rstrip()):
                spans.append((len(before), len(after.rstrip())))
        return spans


@dataclass
class Packer:
    """Packs the conversations of one split into rows; yields each row, its marks and its conversations when it is closed."""

    rows: Rows
    pad: int
    cut: int = 0  # conversations cut at the end of a row
    dropped: int = 0  # and those left out
    without_answer: int = 0  # left out because no token of an answer is in the row
    _opened: int = 0  # rows so far
    _open: dict[int, list[Marked]] = field(default_factory=dict)  # by number, in the order in which they were opened
    _filled: list[tuple[int, int]] = field(default_factory=list)  # tokens and number of each open row, sorted

    def add(self, conversation: Marked) -> Iterator[list[Marked]]:
        length = self.rows.length
        if len(conversation.ids) > length:
            if self.rows.too_long == "drop":
                self.dropped += 1
                return
            self.cut += 1
            conversation = Marked(conversation.name, conversation.ids[:length], conversation.marks[:length])
        # The first token of a row is no target.
        if not (conversation.marks[1:] & ANSWER).any():
            self.without_answer += 1
            return
        fitting = bisect.bisect_left(self._filled, (length - len(conversation.ids) + 1, 0))
        if fitting:
            filled, row = self._first(self._filled[fitting - 1][0])
        else:
            filled, row = 0, self._opened
            self._opened, self._open[row] = self._opened + 1, []
        self._open[row].append(conversation)
        filled += len(conversation.ids)
        bisect.insort(self._filled, (filled, row))
        if filled == length or len(self._open) > _OPEN_ROWS:
            yield self._close(*self._first(self._filled[-1][0]))

    def _first(self, filled: int) -> tuple[int, int]:
        """Take the first row with this number of tokens out of `_filled`."""
        return self._filled.pop(bisect.bisect_left(self._filled, (filled, 0)))

    def finish(self) -> Iterator[list[Marked]]:
        for row, filled in sorted((row, filled) for filled, row in self._filled):
            yield self._close(filled, row)
        self._filled.clear()

    def _close(self, filled: int, number: int) -> list[Marked]:
        """A full row: its conversations, the last of which ends with padding."""
        row = self._open.pop(number)
        name, ids, marks = row[-1]
        padding = (0, self.rows.length - filled)
        row[-1] = Marked(name, np.pad(ids, padding, constant_values=self.pad), np.pad(marks, padding))
        return row


def messages_of(text: str) -> list[dict[str, str]]:
    """The messages of a document of `ConversationSource`."""
    messages: list[dict[str, str]] = json.loads(text)
    return messages


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills rows; it is never a target."""
    pad = tokenizer.interface.pad
    return pad if pad is not None and pad < tokenizer.vocab_size else next(iter(tokenizer.interface.eos), 0)
