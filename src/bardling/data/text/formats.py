"""What a file of a source contains: text, rows, an archive, or a format that is refused by name.

The first bytes decide, then the name, then the first rows. A file is JSON Lines if its name says so, if it is a `.json` file
whose first line is a complete object, if a field is named and its first line is an object, or if all rows at its start are
objects with the field. It is a JSON array if it begins with an object in one that has the field, or if its name is `.json`; a
CSV or TSV table if its name says so, or if it has no suffix, a field is named, and its first line has a column of that name.
JSON documents and tables would otherwise be trained on as raw syntax.
"""

import csv
import json
import re
from pathlib import PurePath
from typing import Any, NamedTuple

from bardling.data.text.compression import COMPRESSED, Stream
from bardling.data.text.fields import RowText
from bardling.data.text.rows import LONGEST_ROW
from bardling.files.decoding import HEAD, MARK, byte_order_mark, known_format, wide_encoding

_ROWS = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_DOCUMENTS = (".json", ".ipynb", ".geojson")
_TABLES = {".csv": "", ".tsv": "\t", ".tab": "\t"}  # and what separates their columns, if that is known
_ARCHIVES = (".tgz", ".tbz2", ".txz", ".tzst")
_MAGIC = (
    (0, b"PAR1", "Parquet"),
    (0, b"ARROW1", "Arrow"),
    (257, b"ustar", "tar"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
)

NOT_ALWAYS_READ = (*COMPRESSED, *_TABLES, ".json", ".parquet", ".arrow", ".feather", ".tar", ".zip")
"""Suffixes of files that earlier versions left out of folders, at least some of them."""


class Contents(NamedTuple):
    """What is in a file."""

    kind: str = "text"  # or a name of `READERS` or `ARCHIVES`
    encoding: str = ""  # of rows
    wanted: RowText = RowText()
    delimiter: str = ","
    fault: str = ""  # why it is not read: a noun with its article
    remedy: str = ""


def examine(stream: Stream, name: str, label: str, wanted: RowText, encoding: str, *, named: bool) -> Contents:
    """Look at the start of a file, decompressed. `named` tells that the user has named the field; `encoding` is the user's."""
    head, suffix = stream.peek(HEAD), _suffix(name)
    if found := next((kind for offset, magic, kind in _MAGIC if head.startswith(magic, offset)), ""):
        if found == "zip" and suffix not in ("", ".zip"):
            return Contents(fault=f"a document in a zip archive ({suffix})", remedy="save it as plain text")
        return Contents(found, wanted=wanted)
    if suffix == ".arrow" and head.startswith(b"\xff\xff\xff\xff"):
        return Contents("Arrow", wanted=wanted)
    if head and (suffix == ".tar" or name.lower().endswith(_ARCHIVES)):  # of before 1988, or none
        return Contents("tar")
    if known := known_format(head, label):
        return Contents(fault=known[0], remedy=known[1])
    encoding = byte_order_mark(head)[0] or encoding
    if not head or (not encoding and wide_encoding(head)):
        return Contents(
            "JSON Lines" if suffix in _ROWS else "text", encoding or "utf-8", wanted
        )  # decoding it as text names the encoding
    encoding = encoding or "utf-8"
    if suffix in _TABLES:
        return _table(_first_line(stream, encoding), suffix, encoding, wanted, named=named)
    return _json(stream, head, suffix, PurePath(name).name, encoding, wanted, named=named) or Contents()


def expected_bytes(name: str, size: int) -> int:
    """About how many bytes of text a file of this size has, for progress."""
    return size * (4 if name.lower().endswith((*COMPRESSED, ".parquet", ".zip")) else 1)


def _suffix(name: str) -> str:
    name = name.lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return PurePath(name).suffix


def _json(
    stream: Stream, head: bytes, suffix: str, name: str, encoding: str, wanted: RowText, *, named: bool
) -> Contents | None:
    """Rows of JSON, or a fault; None if it is text."""
    rows, start = suffix in _ROWS, head.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")
    if not rows and start.startswith(b"{"):
        first = _first_rows(_first_lines(stream, encoding), all_of_head=suffix not in _DOCUMENTS and not named)
        rows = bool(first) and (named or (suffix in _DOCUMENTS and len(first) > 1) or not wanted.missing(first[0]))
        if first and not rows and suffix not in _DOCUMENTS:
            fields = ", ".join(repr(field[:60]) for field in list(first[0])[:8]) or "none"
            remedy = f"name the field that contains the text, as in {name}:FIELD (it has {fields})"
            return Contents(fault=f"a JSON Lines file without the field {wanted.fields[0]!r}", remedy=remedy)
    if rows:
        return Contents("JSON Lines", encoding, wanted)
    if start.startswith(b"[") and suffix not in _DOCUMENTS:
        return Contents("JSON", encoding, wanted) if _array_of_rows(_decoded(head, encoding), wanted) else None
    if suffix == ".json" or (suffix in _DOCUMENTS and start.startswith(b"[")):
        return Contents("JSON", encoding, wanted)
    if suffix in _DOCUMENTS:
        return Contents(fault="a JSON document", remedy="convert it to JSON Lines, one object with its text per line")
    if named and not suffix:
        line = _first_line(stream, encoding)
        table = _table(line, suffix, encoding, wanted, named=True)
        columns = _columns(line, table.delimiter)
        return table if len(columns) > 1 and not wanted.missing(columns) else None
    return None


def _table(header: str, suffix: str, encoding: str, wanted: RowText, *, named: bool) -> Contents:
    """A CSV or TSV table. Without a named field, one with a single column has the text there."""
    delimiter = _TABLES.get(suffix) or max(",;\t|", key=lambda mark: (header.count(mark), mark == ","))
    columns = _columns(header, delimiter)
    if len(columns) == 1 and not named:
        wanted = RowText(columns[0])
    return Contents("CSV", encoding, wanted, delimiter)


def _columns(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _decoded(data: bytes, encoding: str) -> str:
    """The text of the beginning of a file."""
    return data.decode(encoding, "ignore").lstrip(MARK)


def _array_of_rows(text: str, wanted: RowText) -> bool:
    """Whether a text is the start of a JSON array of objects that have the field."""
    begin = re.match(r"\s*\[\s*(?=\{)", text)
    try:
        return begin is not None and not wanted.missing(json.JSONDecoder().raw_decode(text, begin.end())[0])
    except (ValueError, RecursionError):
        return False


def _first_line(stream: Stream, encoding: str) -> str:
    return next((line for line in _decoded(stream.peek(HEAD), encoding).splitlines() if line.strip()), "")


def _first_lines(stream: Stream, encoding: str) -> list[bytes]:
    """The lines in the first `HEAD` bytes, in UTF-8, the last one complete unless it is very long."""
    size = HEAD
    while True:
        data = stream.peek(size)
        whole = len(data) < size
        text = data if encoding == "utf-8" else _decoded(data, encoding).encode()
        end = text.find(b"\n", HEAD - 1)
        if end >= 0 or whole or size > LONGEST_ROW:
            return (text if end < 0 else text[: end + 1]).split(b"\n")
        size *= 2


def _first_rows(lines: list[bytes], *, all_of_head: bool) -> list[dict[str, Any]]:
    """The objects at the start of a file, one per line; empty if the first line, or one `all_of_head`, is not an object."""
    found: list[dict[str, Any]] = []
    try:
        for line in lines:
            text = line.decode().strip().lstrip(MARK)
            if text:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                found.append(row)
    except (ValueError, RecursionError):
        return [] if all_of_head else found
    return found
