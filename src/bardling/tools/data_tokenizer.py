"""Trains a tokenizer on a sample of a source's training text, and measures tokenizers on the same sample.

The sample is deterministic: documents of the training split whose hash is below a limit, which is set so that they have about
the wanted size together; a source that is smaller is taken whole. It is the same for every tokenizer, so that two can be
compared.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bardling.config import DataConfig
from bardling.data.tokens.split_text import open_split_text
from bardling.data.tokens.token_report import token_report
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

_MEASURED = 16 << 20  # characters that tokenizers are measured on
_PART = 1 << 20  # characters of a document that are measured at once

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """Training text of about `size` bytes, which can be read again and again."""

    config: DataConfig
    size: int
    progress: Progress

    def texts(self) -> Iterator[str]:
        text = open_split_text(self.config)
        limit = min(1.0, self.size / text.size if text.size else 1.0) * 2.0**64
        done = 0
        for _, split, pieces in text.documents():
            part = "".join(pieces)
            digest = hashlib.sha256(b"sample" + part.encode("utf-8", "surrogatepass")).digest()
            if split == "train" and (int.from_bytes(digest[:8], "big") < limit or text.cut):
                part = part[: max(0, self.size - done)]
                done += len(part)
                self.progress("reading the sample", done, min(self.size, text.size))
                if part:
                    yield part

    def measured(self) -> list[str]:
        """The parts of the sample that tokenizers are measured on."""
        parts, done = list[str](), 0
        for text in self.texts():
            for begin in range(0, len(text), _PART):
                if done < _MEASURED:
                    parts.append(text[begin : begin + min(_PART, _MEASURED - done)])
                    done += len(parts[-1])
        if not parts:
            raise UserError(f"data.source = {self.config.source!r}: the sample has no training text: raise --sample")
        return parts


def compare(tokenizer: Tokenizer, other: Tokenizer | None, texts: list[str]) -> dict[str, Any]:
    """The report of a tokenizer, with `other_bytes_per_token`, that of another on the same text."""
    report = token_report(tokenizer, texts)
    return report if other is None else report | {"other_bytes_per_token": token_report(other, texts)["bytes_per_token"]}
