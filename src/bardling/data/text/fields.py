"""The text of a row: a field, or a template of several.

A field is named as it is written (`text`), or with dots where it is nested (`meta.title`). A template has fields in braces,
`{title}\\n\\n{body}`; `{{` and `}}` are braces. A field must contain text. In a template, numbers are written as in Python, and
null is empty and counted.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bardling.errors import UserError, closest
from bardling.files.decoding import MARK

DEFAULT_FIELD = "text"
_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
_ABSENT = object()


def unescaped(text: str) -> str:
    r"""A setting with `\n`, `\t`, `\r` and `\\` replaced by the characters, which shells do not do."""
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found[0]], text)


def instead(name: str, names: Iterable[object]) -> str:
    """For messages, what a row or a table has instead of a field; its names may be long, and many."""
    known = [str(one)[:60] for one in itertools.islice(names, 100)]
    return f"{closest(name, known)}; it has {', '.join(map(repr, known[:8])) or 'none'}"


def valid_text(text: str) -> str:
    """The text, with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    if text.isascii():  # known without looking at the characters
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class RowText:
    """How a row becomes a text. `spec` is the name of a field or a template."""

    spec: str = DEFAULT_FIELD

    @cached_property
    def template(self) -> list[tuple[bool, str]]:
        """The parts of a template, each the name of a field (True) or literal text; empty if `spec` is a field."""
        parts, end, fields = list[tuple[bool, str]](), 0, 0
        for found in _PART.finditer(self.spec):
            parts.append((False, unescaped(self.spec[end : found.start()])))
            end = found.end()
            if found[1]:
                parts.append((True, found[1]))
                fields += 1
            elif len(found[0]) == 2:
                parts.append((False, found[0][0]))
            else:
                rule = "a brace without its other half: write {NAME}, or {{ and }} for braces in the text"
                raise UserError(f"data.field = {self.spec!r}: {rule}")
        if not fields:
            return []
        return [part for part in (*parts, (False, unescaped(self.spec[end:]))) if part[1]]

    @cached_property
    def fields(self) -> list[str]:
        return [name for is_field, name in self.template if is_field] or [self.spec]

    def missing(self, columns: Any) -> str:
        """The first field that a row or a table with these columns does not have; empty if it has all."""
        return next((name for name in self.fields if name not in columns and name.split(".")[0] not in columns), "")

    def text(self, row: Any, place: str, remedy: str) -> tuple[str | None, int]:
        """The text of a row, None if it is null, and the number of null fields in a template.

        A `UserError` begins with `place` and tells what the row has instead of the field.
        """
        if isinstance(row, str) and self.spec == DEFAULT_FIELD:
            row = {DEFAULT_FIELD: row}
        if not isinstance(row, Mapping):
            raise UserError(f"{place} is not a JSON object: each row must be one with a field {self.fields[0]!r}")
        if not self.template:
            value = self._value(row, self.spec, place, remedy)
            if not isinstance(value, str | None):
                raise UserError(f"{place}, field {self.spec!r} contains {type(value).__name__}, not text: {remedy}")
            return value and valid_text(value).lstrip(MARK), 0
        parts, nulls, filled = list[str](), 0, False
        for is_field, part in self.template:
            value = self._value(row, part, place, remedy) if is_field else part
            if isinstance(value, bool) or not isinstance(value, str | int | float | None):
                kind = type(value).__name__
                raise UserError(f"{place}, field {part!r} contains {kind}, not text or a number: name other fields")
            nulls += value is None
            filled |= is_field and value not in (None, "")
            parts.append("" if value is None else str(value))
        return (valid_text("".join(parts)) if filled else None), nulls

    def _value(self, row: Mapping[str, Any], name: str, place: str, remedy: str) -> Any:
        value: Any = row.get(name, _ABSENT)
        if value is not _ABSENT:
            return value
        value = row
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is _ABSENT:
            raise UserError(f"{place} has no field {name!r}{instead(name, row)}: {remedy}")
        return value
