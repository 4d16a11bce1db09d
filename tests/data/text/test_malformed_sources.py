"""Malformed and hostile files as sources: each is refused in one line, or what is wrong with it is left out and counted.

The table has a row for each: the name of the file, its bytes, and part of the message or of the findings. Nothing may be
written of a dataset that is refused. `benchmarks/fuzz_text_targets.py` changes valid files of each format at random.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from test_formats import FORMATS as VALID
from test_formats import ROWS, csv, lines, packed, table, tar, texts, zstd

from bardling.data.text import compression, rows
from bardling.data.text.findings import describe_findings
from bardling.data.text.sources import open_source
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError

GOOD = lines()
MANY = lines([{"text": f"row {number} " + "word " * 50} for number in range(200)])


class Case(NamedTuple):
    name: str
    data: bytes | Callable[[], bytes]
    expected: str  # of the message, or of the findings if texts are left
    left: int | None = None  # documents; None: the file is refused
    field: str = ""


def member(name: str, data: bytes = b"x", **attributes: object) -> bytes:
    """A tar archive with one more member, which has these attributes, after `ok.txt`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for one, content, more in (("ok.txt", b"fine", {}), (name, data, attributes)):
            info = tarfile.TarInfo(one)
            info.size = len(content)
            for key, value in more.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def sparse() -> bytes:
    """A GNU sparse member that claims 1 TiB."""
    data = bytearray(member("huge.bin", b"x" * 512))
    at = 1024  # its header
    data[at + 156] = ord("S")
    data[at + 386 : at + 410] = b"00000000000\0" + b"00000001000\0"  # offset and size of its only piece
    data[at + 483 : at + 495] = b"\x80\0\0\0\0\0\x01\0\0\0\0\0"  # its size in base 256
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def claims(size: bytes) -> bytes:
    """A tar archive whose member has this size, in 12 bytes."""
    data = bytearray(member("a.txt", b"x" * 512))
    at = 1024  # its header
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(packed({"ok.txt": b"fine", "secret.txt": b"hidden"}, zipfile.ZIP_STORED))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + offset] |= 1
    return bytes(data)


def wrong_sum() -> bytes:
    data = bytearray(packed({"a.txt": b"fine text"}, zipfile.ZIP_STORED))
    data[data.index(b"fine")] ^= 1
    return bytes(data)


def overlapping() -> bytes:
    """A zip archive whose second entry is inside its first."""
    data = bytearray(packed({"a.txt": b"a" * 99, "b.txt": b"b" * 99}, zipfile.ZIP_STORED))
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    return bytes(data)


def offsets_outside() -> bytes:
    """An Arrow stream with text that would be far outside its buffer."""
    data = bytearray(table("stream", [{"text": "abcd"}, {"text": "efgh"}]))
    at = data.rindex(struct.pack("<3i", 0, 4, 8))
    data[at : at + 12] = struct.pack("<3i", 0, 1 << 28, 1 << 29)
    return bytes(data)


def parquet(*rows: dict, schema: dict[str, str] | None = None) -> Callable[[], bytes]:
    def make() -> bytes:
        if schema is None:
            return table("parquet", list(rows))
        pyarrow, buffer = pytest.importorskip("pyarrow"), io.BytesIO()
        fields = [(name, getattr(pyarrow, kind)()) for name, kind in schema.items()]
        made = pyarrow.Table.from_pylist(list(rows), schema=pyarrow.schema(fields))
        pytest.importorskip("pyarrow.parquet").write_table(made, buffer)
        return buffer.getvalue()

    return make


def bomb(compress: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: compress(bytes(compression.EXPANSION_FREE + (1 << 20)))


CASES = {
    "torn gzip": Case("a.jsonl.gz", gzip.compress(MANY)[:-9], "is damaged gzip data"),
    "torn gzip of text": Case("a.txt.gz", gzip.compress(b"text " * 99)[:-9], "is damaged gzip data"),
    "torn bzip2": Case("a.jsonl.bz2", bz2.compress(MANY)[:-9], "is damaged bzip2 data"),
    "torn xz": Case("a.jsonl.xz", lzma.compress(MANY)[:-9], "is damaged xz data"),
    "torn Zstandard": Case("a.jsonl.zst", lambda: zstd(MANY)[:-9], "is damaged Zstandard data (a frame is truncated)"),
    "gzip and rubbish": Case("a.jsonl.gz", gzip.compress(GOOD) + b"rubbish", "is damaged gzip data"),
    "a flipped bit in gzip": Case("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-6] + bytes(6), "is damaged gzip data"),
    "an xz header alone": Case("a.xz", b"\xfd7zXZ\0", "is damaged xz data"),
    "gzip bomb": Case("a.txt.gz", bomb(gzip.compress), "as a decompression bomb does"),
    "bzip2 bomb": Case("a.txt.bz2", bomb(bz2.compress), "as a decompression bomb does"),
    "xz bomb": Case("a.txt.xz", bomb(lzma.compress), "as a decompression bomb does"),
    "Zstandard bomb": Case("a.jsonl.zst", bomb(zstd), "as a decompression bomb does"),
    "bomb in a tar": Case("a.tar.gz", bomb(lambda data: gzip.compress(tar({"a.txt": data}))), "as a decompression bomb does"),
    "zip bomb": Case("a.zip", bomb(lambda data: packed({"a.txt": data})), "1 x decompression bomb (a.zip!a.txt)"),
    "compressed three times": Case("a.gz", gzip.compress(gzip.compress(gzip.compress(b"x"))), "is gzip data"),
    "lone surrogates": Case("a.jsonl", b'{"text": "a\\ud800b"}\n', "", 1),
    "surrogates in UTF-8": Case("a.txt", b"a\xed\xa0\x80b", "is not UTF-8 text (byte 1 is 0xed)"),
    "a line over the limit": Case("a.jsonl", b'{"text": "' + b"x" * 250_000 + b'"}\n' + GOOD, "1 x row of more than 0 MiB", 2),
    "only a line over the limit": Case("a.jsonl", b'{"text": "' + b"x" * 250_000, "1 x row of more than 0 MiB (a.jsonl:1)"),
    "an element over the limit": Case("a.json", b'[{"text": "' + b"x" * 900_000, "element 1: it is longer than 0 MiB"),
    "a CSV line longer than the limit": Case("a.csv", b"text\n" + b"x" * 250_000, "line 2 is longer than 0 MiB"),
    "nested JSON in a line": Case("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
    "nested JSON in an array": Case("a.json", b'[{"text": ' + b"[" * 100_000, "is not valid JSON (element 1"),
    "nested arrays": Case("a.json", b"[" * 100_000, "is not valid JSON"),
    "a field with objects": Case("a.jsonl", b'{"text": {"a": 1}}\n', "line 1, field 'text' contains dict, not text"),
    "a torn array": Case("a.json", json.dumps(ROWS).encode()[:-1], "the array has no end: it is truncated"),
    "an array without commas": Case("a.json", b'[{"text": "x"} {"text": "y"}]', "expected a comma or the end of the array"),
    "more after an array": Case("a.json", b'[{"text": "x"}] {"text": "y"}', "more data after the array"),
    "a number of 5,000 digits": Case("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
    "an empty array": Case("a.json", b"[]", "is empty"),
    "an array of numbers": Case("a.json", b"[1, 2]", "element 1 is not a JSON object"),
    "a numeric field": Case("a.jsonl", b'{"text": 5}\n', "line 1, field 'text' contains int, not text"),
    "a boolean in a template": Case("a.jsonl", b'{"text": true}\n', "field 'text' contains bool", None, "{text}"),
    "a later row without the field": Case("a.jsonl", GOOD + b'{"body": "x"}\n', "line 3 has no field 'text'; it has 'body'"),
    "a field of null only": Case("a.jsonl", b'{"text": null}\n' * 3, "3 x empty file or row"),
    "mixed encodings": Case("a.txt", "é ".encode() * 9 + "é".encode("cp1252"), "is not UTF-8 text (byte 27 is 0xe9)"),
    "mixed encodings in JSON Lines": Case("a.jsonl", GOOD + '{"text": "é"}\n'.encode("cp1252"), "line 3 is not JSON in UTF-8"),
    "mixed encodings in CSV": Case("a.csv", csv() + "\r\n,é,".encode("cp1252"), "line 5 is not UTF-8 (byte 0xe9)"),
    "mixed encodings in an array": Case("a.json", b'[{"text": "\xe9"}]', "is not JSON in UTF-8"),
    "half of a character": Case("a.jsonl", b"\xff\xfe" + '{"text": "x"}'.encode("utf-16-le") + b"x", "is not utf-16-le text"),
    "half a character of UTF-16 text": Case("a.txt", b"\xff\xfea\0b", "is not UTF-16-LE text"),
    "an empty Parquet file": Case("a.parquet", parquet(schema={"text": "string"}), "is empty"),
    "Parquet without the column": Case("a.parquet", parquet({"body": "x"}), "has no field 'text'; it has 'body'"),
    "Parquet with odd names": Case("a.parquet", parquet({"a\nb" * 99: "x"}), "it has 'a\\nba"),
    "JSON with long names": Case("a.jsonl", json.dumps({"x" * 9000: 1}).encode(), "line 1 has no field 'text'; it has 'xxx"),
    "Parquet with numbers": Case("a.parquet", parquet({"text": 5}), "field 'text' contains int64, not text"),
    "Parquet with bytes": Case("a.parquet", parquet({"text": b"x"}), "field 'text' contains binary, not text"),
    "Parquet of nulls": Case("a.parquet", parquet({"text": None}, schema={"text": "string"}), "is empty"),
    "torn Parquet": Case("a.parquet", lambda: table("parquet")[:-20], "is damaged Parquet data"),
    "Parquet of nothing": Case("a.parquet", b"PAR1PAR1", "is damaged Parquet data"),
    "torn Arrow": Case("a.arrow", lambda: table("feather")[:-20], "is damaged Arrow data"),
    "torn Arrow stream": Case("a.arrow", lambda: table("stream")[:200], "is damaged Arrow data"),
    "Arrow with offsets outside": Case("a.arrow", offsets_outside, "is damaged Arrow data"),
    "tar with ../": Case("a.tar", member("../../evil.txt"), "outside the archive (a.tar!../../evil.txt)", 1),
    "tar with an absolute path": Case("a.tar", member("/etc/evil"), "1 x member with a path outside the archive", 1),
    "tar with a link": Case("a.tar", member("x", b"", type=tarfile.SYMTYPE, linkname="/etc"), "1 x not a regular file", 1),
    "tar with a device": Case("a.tar", member("null", b"", type=tarfile.CHRTYPE), "1 x not a regular file", 1),
    "tar with a sparse member": Case("a.tar", sparse, "1 x not a regular file (a.tar!huge.bin)", 1),
    "tar with a name of 10 KB": Case("a.tar", member("x/" * 5000 + "a.txt"), "", 2),
    "tar with a header of 0.1 MB": Case("a.tar", member("x/" * 50_000 + "a.txt"), "(an extended header of 100,"),
    "tar that claims exabytes": Case("a.tar", claims(b"\x80\0\0\0\x7f" + b"\xff" * 7), "is damaged tar data"),
    "tar that claims less than nothing": Case("a.tar", claims(b"\xff" * 12), "is damaged tar data (a negative size)"),
    "tar with line breaks in a name": Case("a.tar", member("a\nb\udcff.png", b"\x89PNG\r\n"), "1 x PNG image (a.tar!a?b?", 1),
    "torn tar": Case("a.tar", member("a.txt", b"x" * 9000)[:4000], "is damaged tar data"),
    "tar torn between members": Case("a.tar", member("a.txt")[:1024], "1 x tar archive without the mark of its end", 1),
    "tar with a wrong checksum": Case("a.tar", member("a.txt").replace(b"a.txt", b"b.txt"), "", 1),
    "a tar that is none": Case("a.tar", b"text " * 999, "is damaged tar data"),
    "an empty tar": Case("a.tar", tar({}), "a.tar: is empty"),
    "an empty zip": Case("a.zip", packed({}), "a.zip: is empty"),
    "torn zip": Case("a.zip", packed({"a.txt": b"x" * 99})[:-30], "is damaged zip data"),
    "zip with a wrong checksum": Case("a.zip", wrong_sum, "1 x damaged zip data (a.zip!a.txt)"),
    "zip with entries that overlap": Case("a.zip", overlapping, "is damaged zip data"),
    "zip with a password": Case("a.zip", encrypted, "1 x encrypted member (a.zip!secret.txt)", 1),
    "zip with ../": Case("a.zip", packed({"ok.txt": b"fine", "..\\evil.txt": b"x"}), "1 x member with a path outside", 1),
    "zip in a zip": Case("a.zip", packed({"b.zip": packed({"a.txt": b"x"})}), "1 x archive inside an archive (a.zip!b.zip)"),
    "torn JSON in a zip": Case("a.zip", packed({"ok.txt": b"fine", "a.jsonl": b'{"text": '}), "1 x JSON Lines without", 1),
    "CSV with a quote without its end": Case("a.csv", b'text\n"one\ntwo\n', "the row at line 2 is not CSV (unexpected end"),
    "CSV with two columns of a name": Case("a.csv", b"text,text\na,b\n", "has two columns 'text'"),
    "CSV with rows of other lengths": Case("a.csv", b"text,b\n1,2\n1,2,3\n1\n", "2 x row with more or fewer columns", 1),
    "CSV of a header": Case("a.csv", b"text,title\n", "is empty"),
    "CSV with NUL": Case("a.csv", b"text,b\n\0,2\n", "1 x NUL character", 1),
    "a binary file named CSV": Case("a.csv", bytes(range(256)) * 9, "a.csv: "),
}  # fmt: skip


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of at most 200 KB, so that files need not be large."""
    monkeypatch.setattr(compression, "EXPANSION_FREE", 2 << 20)
    monkeypatch.setattr(rows.Table, "longest", 200_000)
    defaults = rows.Table.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(rows.Table.__init__, "__defaults__", (*defaults[:-1], 200_000))


def fault_of(call: Callable[[], object]) -> str:
    """The message of a `UserError`, which must be one line; empty if there is none."""
    try:
        call()
    except UserError as error:
        message = str(error)
    else:
        return ""
    assert message
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("what", CASES)
def test_what_is_malformed_is_refused_in_one_line_or_counted(what: str, tmp_path: Path) -> None:
    case = CASES[what]
    path = tmp_path / case.name
    path.write_bytes(case.data() if callable(case.data) else case.data)
    source = open_source(str(path), field=case.field)
    if case.left is None:
        with pytest.raises(UserError) as caught:
            prepare(str(path), tmp_path / "ds", "byte", field=case.field)
        message = str(caught.value)
        assert case.expected in message
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 1000 + 2 * len(str(path))
    else:
        assert len(list(source.documents())) == case.left
        assert case.expected in "; ".join(describe_findings(source.findings.facts()))
    assert [entry.name for entry in tmp_path.iterdir()] == [case.name], "something was written"


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("what", CASES)
def test_a_folder_with_a_malformed_file_is_read_or_the_row_is_named(what: str, tmp_path: Path) -> None:
    case = CASES[what]
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / f"z-{case.name}").write_bytes(case.data() if callable(case.data) else case.data)
    source = open_source(str(tmp_path), field=case.field)
    documents = source.documents()
    assert next(documents).text == "good text"
    fault = fault_of(lambda: list(documents))
    assert not fault or f"z-{case.name}" in fault


def test_a_line_of_800_mb_is_skipped_in_little_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(800 << 20)  # NUL bytes, without room on disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_source(str(path))
    assert [document.text for document in source.documents()] == [row["text"] for row in ROWS] * 2
    assert source.findings.facts()["left_out"] == {"row of more than 64 MiB": {"count": 1, "names": ["a.jsonl:3"]}}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KB"


@pytest.mark.parametrize("name", VALID)
def test_random_changes_give_documents_or_one_line(name: str, tmp_path: Path) -> None:
    """A few changes of each format; `benchmarks/fuzz.py --kind text` makes thousands, with limits of time and memory."""
    draw = random.Random(f"1:{name}")
    valid = VALID[name]()
    path = tmp_path / name
    outcomes = set()
    for _ in range(60):
        data = bytearray(valid)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        fault = fault_of(lambda: [text.encode() for text in texts(path)])
        assert not fault or str(path) in fault
        outcomes.add(bool(fault))
    assert True in outcomes
