"""What a file of a source contains: text, JSON Lines under any name (plain or gzipped), or a format that is refused by name.

The first bytes decide, then the name, then the first rows. A file is JSON Lines if its name says so, if it is a `.json` file
whose first line is a complete object, if a field is named and its first line is an object, or if all rows at its start are
objects with the field. JSON documents and tables would otherwise be trained on as raw syntax.
"""

import gzip
import io
import json
import shlex
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import HEAD, MARK, byte_order_mark, known_format, wide_encoding

_ROWS = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_DOCUMENTS = (".json", ".ipynb", ".geojson")
_TABLES = {".csv": ("CSV", ","), ".tsv": ("TSV", "\\t"), ".tab": ("TSV", "\\t")}
_GZIP = b"\x1f\x8b\x08"
_FROM_ARRAY = "import json,sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8-sig'))]"
_FROM_TABLE = (
    "import csv,json,sys; csv.field_size_limit(1 << 30); "
    "[print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter='{}')]"
)


class Contents(NamedTuple):
    """What is in a file."""

    rows: bool = False  # JSON Lines instead of text
    gzipped: bool = False
    encoding: str = ""  # of rows
    fault: str = ""  # why it is not read: a noun with its article
    remedy: str = ""


def examine(path: Path, field: str, encoding: str, *, named_field: bool) -> Contents:
    """Look at the start of a file. `named_field` tells that the user has named the `field`; `encoding` is the user's."""
    with os_error_as_user_error(path, "read"), path.open("rb") as file:
        head = file.read(HEAD)
    name, gzipped = path.name.lower(), head.startswith(_GZIP)
    if known := known_format(head, str(path)):
        if not gzipped:
            return Contents(fault=known[0], remedy=known[1])
        name, head = name.removesuffix(".gz"), _inflate(head)
    encoding = byte_order_mark(head)[0] or encoding
    if not encoding and wide_encoding(head):
        return Contents()  # decoding it as text names the encoding
    encoding = encoding or "utf-8"
    suffix = Path(name).suffix
    rows = suffix in _ROWS
    if not rows and suffix not in _TABLES and head.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"{"):
        first = _first_rows(row_lines(path, gzipped, encoding), all_of_head=suffix not in _DOCUMENTS and not named_field)
        rows = bool(first) and (named_field or (suffix in _DOCUMENTS and len(first) > 1) or field in first[0])
        if first and not rows and suffix not in _DOCUMENTS:
            fields = ", ".join(map(repr, list(first[0])[:8])) or "none"
            remedy = f"name the field that contains the text, as in {path.name}:FIELD (it has {fields})"
            return Contents(fault=f"a JSON Lines file without the field {field!r}", remedy=remedy)
    if rows:
        return Contents(True, gzipped, encoding)
    if head and (suffix in _DOCUMENTS or suffix in _TABLES):
        kind, remedy = _structured(path, suffix, head)
        return Contents(fault=kind, remedy=f"decompress it, then {remedy}" if gzipped else remedy)
    return Contents(fault=known[0], remedy=known[1]) if known else Contents()


def _inflate(head: bytes) -> bytes:
    """The beginning of gzip data; empty if it is damaged."""
    try:
        return zlib.decompressobj(31).decompress(head, HEAD)
    except zlib.error:
        return b""


def _structured(path: Path, suffix: str, head: bytes) -> tuple[str, str]:
    """Name and remedy of a JSON document or a table."""
    plain = Path(str(path).removesuffix(".gz"))
    files = f"{shlex.quote(str(plain))} > {shlex.quote(str(plain.with_suffix('.jsonl')))}"
    if suffix in _TABLES:
        kind, delimiter = _TABLES[suffix]
        return f"a {kind} table", f'convert it to JSON Lines, `python -c "{_FROM_TABLE.format(delimiter)}" {files}`'
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return "a JSON array", f'convert it to JSON Lines, `python -c "{_FROM_ARRAY}" {files}`'
    return "a JSON document", "convert it to JSON Lines, one object with its text per line"


def row_lines(path: Path, gzipped: bool, encoding: str, longest: int = -1) -> Iterator[bytes]:
    """The lines of a file in UTF-8, in pieces of `longest` bytes (-1: whole lines); a `UserError` if it is damaged."""
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            if encoding == "utf-8":
                yield from iter(partial(file.readline, longest), b"")
            else:
                for line in io.TextIOWrapper(file, encoding, newline="\n"):
                    yield line.encode()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is damaged gzip data ({' '.join(str(error).split())[:120]}): fetch it again") from None
    except UnicodeError as error:
        fault = f"is not {encoding} text ({getattr(error, 'reason', error)})"
        raise UserError(f"{path}: {fault}: set --data.encoding to the encoding that it was written in") from None
    except OSError as error:
        with os_error_as_user_error(path, "read"):
            raise error from None


def _first_rows(lines: Iterable[bytes], *, all_of_head: bool) -> list[dict[str, Any]]:
    """The objects at the start of a file, one per line; empty if the first line, or one `all_of_head`, is not an object."""
    found: list[dict[str, Any]] = []
    size = 0
    try:
        for line in lines:
            size += len(line)
            text = line.decode().strip().lstrip(MARK)
            if text:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                found.append(row)
            if size >= HEAD:
                break
    except (ValueError, RecursionError):  # also UserError
        return [] if all_of_head else found
    return found
