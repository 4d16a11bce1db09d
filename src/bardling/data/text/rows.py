"""Formats with rows: JSON Lines, JSON arrays and documents, CSV and TSV, Parquet, Arrow.

`READERS` has a function for each, which yields the number of every row, as it is named in messages, and its content. A new
format is one function and one line there, and whatever recognises it in `formats.py`. Rows of JSON and CSV have the number of
their line or element, counted from 1; those of Parquet and Arrow are counted from 0, as on the hub.

Memory is bounded by one row. One of more than `LONGEST_ROW` bytes is skipped and counted where it ends at a line break, else it
is an error. Limits: a Parquet file, and an Arrow file that is not a stream, are copied to a temporary file if they are
compressed or inside an archive.
"""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from bardling.data.text.compression import EXTRA, Stream, damage, seekable
from bardling.data.text.fields import RowText, instead
from bardling.errors import UserError
from bardling.files.decoding import MARK

LONGEST_ROW = 64 << 20  # bytes; JSON takes up to twenty times as much when it is parsed
_CHUNK = 1 << 18
_BATCH = 128  # rows of a table converted at once
_TEXT = ("string", "large_string", "string_view")  # types of Arrow
_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "halffloat", "float", "double")


class TooLong(NamedTuple):
    """Instead of a row that is longer than `LONGEST_ROW`, or otherwise not readable: why it is left out."""

    reason: str


Row = tuple[int, Any]  # number, and content or `TooLong`


@dataclass(frozen=True)
class Table:
    """A file with rows: its bytes, how messages name it, and what is wanted of it."""

    stream: Stream
    label: str
    wanted: RowText
    remedy: str  # how to name another field
    encoding: str = "utf-8"
    delimiter: str = ","
    skip: int = 0  # rows of JSON Lines and Parquet that need not be parsed
    longest: int = LONGEST_ROW  # bytes of a row


def utf8_pieces(stream: Stream, encoding: str, label: str) -> Iterator[bytes]:
    """The content in UTF-8, in pieces."""
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    while piece := stream.read(_CHUNK):
        yield piece if decoder is None else _decode(decoder, piece, encoding, label).encode("utf-8", "surrogatepass")
    if decoder is not None:
        yield _decode(decoder, b"", encoding, label, final=True).encode()


def _decode(decoder: codecs.IncrementalDecoder, piece: bytes, encoding: str, label: str, *, final: bool = False) -> str:
    try:
        return decoder.decode(piece, final)
    except UnicodeError as error:
        fault = f"is not {encoding} text ({getattr(error, 'reason', error)})"
        raise UserError(f"{label}: {fault}: set --data.encoding to the encoding that it was written in") from None


def lines(pieces: Iterator[bytes], longest: int) -> Iterator[bytes | None]:
    """The lines of a text, with their line breaks; None for one that is longer than `longest` bytes."""
    held, size, dropped = list[bytes](), 0, False
    for piece in pieces:
        start = 0
        while (end := piece.find(b"\n", start) + 1) > 0:
            part = piece[start:end]
            yield None if dropped or size + len(part) > longest else b"".join((*held, part)) if held else part
            held, size, dropped, start = [], 0, False, end
        rest = piece[start:] if start else piece
        size += len(rest)
        if dropped or size > longest:
            held, dropped = [], True
        elif rest:
            held.append(rest)
    if dropped or held:
        yield None if dropped else b"".join(held)


def too_long(longest: int) -> TooLong:
    return TooLong(f"row of more than {longest >> 20} MiB")


def json_lines(table: Table) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped, and so are the first `skip`, unparsed."""
    label = table.label
    for number, line in enumerate(lines(utf8_pieces(table.stream, table.encoding, label), table.longest), 1):
        if number <= table.skip or (line is not None and not line.strip()):
            continue
        if line is None:
            yield number, too_long(table.longest)
            continue
        try:
            yield number, json.loads(line.decode().lstrip(MARK))  # files joined into one have marks inside
        except UnicodeDecodeError as error:
            fault = f"line {number} is not JSON in UTF-8 (byte {error.start} of it is 0x{line[error.start]:02x})"
            raise UserError(f"{label}: {fault}: set --data.encoding, for example to cp1252, or convert the file") from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{label}: line {number} is not JSON ({reason}): each line must be one JSON object") from error


def json_values(table: Table) -> Iterator[Row]:
    """The elements of a JSON array, or JSON documents one after another."""
    text = _JsonText(table)
    array = text.starts("[")
    if array:
        text.at += 1
    number = 0
    while not text.starts("") and not (array and text.starts("]")):
        if array and number:
            if not text.starts(","):
                raise text.fault(number, "expected a comma or the end of the array")
            text.at += 1
        number += 1
        yield number, text.value(number)
    if array:
        if not text.starts("]"):
            raise text.fault(number, "the array has no end: it is truncated")
        text.at += 1
        if not text.starts(""):
            raise text.fault(number, "more data after the array")


class _JsonText:
    """The text of a JSON file from the next value on; what has been parsed is dropped."""

    def __init__(self, table: Table) -> None:
        self._pieces = utf8_pieces(table.stream, table.encoding, table.label)
        self._label, self._longest = table.label, table.longest
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer, self.at, self._end = "", 0, False
        self._parser = json.JSONDecoder()

    def _more(self, size: int) -> bool:
        """Append at least `size` characters, if there are; whether there were any."""
        parts, found = [self._buffer[self.at :]], 0
        while found < size and not self._end:
            piece = next(self._pieces, b"")
            self._end = not piece
            try:
                parts.append(self._decoder.decode(piece, self._end))
            except UnicodeDecodeError as error:
                fault = (
                    f"is not JSON in UTF-8 ({error.reason}): set --data.encoding, for example to cp1252, or convert the file"
                )
                raise UserError(f"{self._label}: {fault}") from None
            found += len(parts[-1])
        self._buffer, self.at = "".join(parts), 0
        return found > 0

    def starts(self, text: str) -> bool:
        """Whether what follows white space starts with `text`; with the empty one, whether nothing follows."""
        while True:
            while self.at < len(self._buffer) and self._buffer[self.at] in " \t\r\n\ufeff":
                self.at += 1
            if self.at < len(self._buffer):
                return bool(text) and self._buffer.startswith(text, self.at)
            if not self._more(_CHUNK):
                return not text

    def value(self, number: int) -> Any:
        self.starts("")
        while True:
            try:
                value, end = self._parser.raw_decode(self._buffer, self.at)
                size = end - self.at
                if end < len(self._buffer) or not self._more(1):  # else a number could go on
                    self.at += size
                    return value
                continue
            except (ValueError, RecursionError) as error:
                place = getattr(error, "pos", 0)
                unfinished = str(error).startswith("Unterminated string") or len(self._buffer) - place < 64
                if self._end or not unfinished:
                    raise self.fault(number, getattr(error, "msg", None) or str(error)) from None
            size = len(self._buffer) - self.at
            if size > self._longest:
                raise self.fault(number, f"it is longer than {self._longest >> 20} MiB")
            self._more(max(_CHUNK, size))

    def fault(self, number: int, reason: str) -> UserError:
        short = " ".join(reason.split())[:160]
        return UserError(f"{self._label}: is not valid JSON (element {number}: {short}): correct it")


def csv_rows(table: Table) -> Iterator[Row]:
    """The rows of a CSV table as dicts; the first line that is not blank has the names of the columns."""
    longest, broken = table.longest, False

    def text() -> Iterator[str]:
        nonlocal broken
        for line in lines(utf8_pieces(table.stream, table.encoding, table.label), longest):
            if line is None:
                broken = True
                return
            yield line.decode().lstrip(MARK) if line[:3] == b"\xef\xbb\xbf" else line.decode()

    csv.field_size_limit(longest)
    reader = csv.reader(text(), delimiter=table.delimiter, strict=True)
    columns: list[str] = []
    number = 1
    try:
        for values in reader:
            if not columns:
                columns = [name.strip() for name in values]
                _check_columns(table, columns)
            elif len(values) == len(columns):
                yield number, dict(zip(columns, values, strict=True))
            elif values:
                yield number, TooLong("row with more or fewer columns than the header")
            number = reader.line_num + 1
    except UnicodeDecodeError as error:
        fault = f"line {number} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
        raise UserError(f"{table.label}: {fault}: set --data.encoding, for example to cp1252, or convert the file") from None
    except csv.Error as error:
        remedy = "correct the quotes there, or convert the table to JSON Lines"
        raise UserError(f"{table.label}: the row at line {number} is not CSV ({error}): {remedy}") from None
    if broken:
        raise UserError(f"{table.label}: line {number} is longer than {longest >> 20} MiB: convert the table to JSON Lines")


def _check_columns(table: Table, columns: list[str]) -> None:
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{table.label}: has two columns {twice[:60]!r}: rename one in the first line")
    if name := table.wanted.missing(columns):
        raise UserError(f"{table.label}: has no column {name!r}{instead(name, columns)}: {table.remedy}")


def parquet_rows(table: Table) -> Iterator[Row]:
    """The rows of a Parquet file from row `skip` on, with the columns that are needed."""
    with _parquet(table) as opened:
        columns = _columns(opened.schema_arrow, table)
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        bounds = list(itertools.accumulate(sizes, initial=0))
        groups = [group for group in range(len(sizes)) if bounds[group + 1] > table.skip]
        if groups:
            batches = opened.iter_batches(_BATCH, row_groups=groups, columns=columns, use_threads=False)
            yield from _records(batches, bounds[groups[0]], table)


def parquet_text_bytes(table: Table) -> int:
    """Uncompressed bytes of the columns that are needed."""
    with _parquet(table) as opened:
        columns = _columns(opened.schema_arrow, table)
        groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
        chunks = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


@contextmanager
def _parquet(table: Table) -> Iterator[Any]:
    parquet = import_arrow(table.label).parquet
    with seekable(table.stream, table.label) as file, damage(table.label, "Parquet data"), parquet.ParquetFile(file) as opened:
        yield opened


def arrow_rows(table: Table) -> Iterator[Row]:
    """The rows of an Arrow file or stream (IPC, Feather), with the columns that are needed."""
    pyarrow = import_arrow(table.label)
    with damage(table.label, "Arrow data"):
        if table.stream.peek(6) != b"ARROW1":
            with pyarrow.ipc.open_stream(io.BufferedReader(table.stream)) as stream:
                yield from _records(_checked(stream), 0, table, _columns(stream.schema, table))
            return
        with seekable(table.stream, table.label) as file, pyarrow.ipc.open_file(file) as opened:
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            yield from _records(_checked(batches), 0, table, _columns(opened.schema, table))


def _checked(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # offsets in the file could point anywhere
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _records(batches: Iterator[Any], row: int, table: Table, columns: list[str] | None = None) -> Iterator[Row]:
    for batch in batches:
        chosen = batch if columns is None else batch.select(columns)
        if row + batch.num_rows > table.skip:
            for number, record in enumerate(chosen.to_pylist(), row):
                if number >= table.skip:
                    yield number, record
        row += batch.num_rows


def _columns(schema: Any, table: Table) -> list[str]:
    """The columns that the text needs, after checking that they are there and contain text."""
    names, wanted = schema.names, table.wanted
    fault = ""
    if name := wanted.missing(names):
        fault = f"has no field {name!r}{instead(name, names)}"
    for name in wanted.fields if not fault else ():
        if name in names:
            kind = str(schema.field(name).type)
            types = (*_TEXT, *(_NUMBERS if wanted.template else ()), "null")
            if kind.removeprefix("dictionary<values=").partition(",")[0] not in types:
                fault = f"field {name!r} contains {kind[:60]}, not text"
    if fault:
        raise UserError(f"{table.label}: {fault}: {table.remedy}")
    return list(dict.fromkeys(name if name in names else name.split(".")[0] for name in wanted.fields))


def import_arrow(label: str) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.ipc  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"{label}: reading Parquet and Arrow needs the package pyarrow: {EXTRA}") from error
    return pyarrow


READERS: dict[str, Callable[[Table], Iterator[Row]]] = {
    "JSON Lines": json_lines,
    "JSON": json_values,
    "CSV": csv_rows,
    "Parquet": parquet_rows,
    "Arrow": arrow_rows,
}
