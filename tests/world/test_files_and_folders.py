"""Files under any name are read as text or JSON Lines, or refused by name; a folder counts what it leaves out."""

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from bardling.data.text.findings import describe_findings
from bardling.data.text.sources import open_source
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError

ROWS = [{"text": "one é", "body": "B1"}, {"text": "two", "body": "B2"}]


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def texts(spec) -> list[str]:
    return [document.text for document in open_source(str(spec)).documents()]


NAMES = ["a.jsonl", "a.JSONL", "a.ndjson", "a.NDJSON", "a.jsonlines", "a.json", "a.txt", "a", "a.dat", "a.log"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_under_any_name(tmp_path, name, packed):
    path = tmp_path / (f"{name}.gz" if packed and "." in name else name)
    path.write_bytes(gzip.compress(lines()) if packed else lines())
    assert texts(path) == ["one é", "two"]
    assert texts(f"{path}:body") == ["B1", "B2"]
    assert texts(tmp_path) == ["one é", "two"]
    assert texts(f"{tmp_path}:body") == ["B1", "B2"]


@pytest.mark.parametrize(
    "text", ['{"a": 1} is how JSON looks\nand this is text\n', "{\n", "[1] A reference\n", "{}text", '{"x": ']
)
def test_text_that_begins_like_json_stays_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text]


def table(kind: str) -> bytes:
    pyarrow, buffer = pytest.importorskip("pyarrow"), io.BytesIO()
    made = pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(made, buffer)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(made, buffer)
    return buffer.getvalue()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("x.txt", "text")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            info = tarfile.TarInfo("x.txt")
            info.size = 4
            file.addfile(info, io.BytesIO(b"text"))
    return buffer.getvalue()


FORMATS = {
    "array.json": (lambda: json.dumps([{"a": 1}], indent=1).encode(), "has no field 'text'"),
    "object.json": (lambda: json.dumps({"rows": ROWS}, indent=1).encode(), "has no field 'text'; it has 'rows'"),
    "single.json": (lambda: b'{"name": "package"}', "has no field 'text'; it has 'name'"),
    "book.ipynb": (lambda: json.dumps({"cells": []}, indent=1).encode(), "a JSON document"),
    "table.csv": (lambda: b"a,b\none,two\n", "has no column 'text'; it has 'a', 'b'"),
    "TABLE.CSV": (lambda: b"a;b\none;two\n", "has no column 'text'; it has 'a', 'b'"),
    "table.tsv": (lambda: b"a\tb\none\ttwo\n", "has no column 'text'"),
    "rows.jsonl.zst": (lambda: b"\x28\xb5\x2f\xfd" + bytes(30), "damaged Zstandard data"),
    "rows.jsonl.xz": (lambda: b"\xfd7zXZ\0" + bytes(30), "damaged xz data"),
    "rows.jsonl.bz2": (lambda: b"BZh91AY&SY" + bytes(30), "damaged bzip2 data"),
    "twice.gz": (lambda: gzip.compress(gzip.compress(b"text")), "is gzip data"),
    "rows.jsonl.lz4": (lambda: b"\x04\x22\x4d\x18" + bytes(30), "is LZ4 data"),
    "all.7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(30), "a 7-Zip archive"),
    "paper.docx": (lambda: archive("zip"), "a document in a zip archive (.docx)"),
    "paper.pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3\n", "a PDF file"),
    "picture.png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(30), "a PNG image"),
    "other.jsonl": (lambda: lines([{"content": "x"}]), "has no field 'text'"),
    "content.txt": (lambda: lines([{"content": "x"}]), "a JSON Lines file without the field 'text'"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_by_name_and_counted_in_a_folder(tmp_path, name):
    make, fault = FORMATS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "text.txt").write_text("text")
    source = open_source(str(tmp_path))
    assert [document.text for document in source.documents()] == ["text"]
    (entry,) = source.findings.facts()["left_out"].values()
    assert entry == {"count": 1, "names": [name]}


def test_the_remedy_works(tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "twice.txt.gz").write_bytes(gzip.compress(gzip.compress(b"plain text\n")))
    with pytest.raises(UserError) as caught:
        texts(folder / "twice.txt.gz")
    command = re.search(r"`(.+)`", str(caught.value))
    assert command is not None
    subprocess.run(["bash", "-c", command[1]], check=True, timeout=60)
    assert texts(folder / "twice.txt") == ["plain text\n"]


def test_what_a_folder_leaves_out_is_counted_and_named(tmp_path):
    root, elsewhere = tmp_path / "src", tmp_path / "elsewhere"
    for path, data in {
        root / "a.txt": b"A",
        root / ".hidden": b"H",
        root / ".git" / "x.txt": b"G",
        root / "latin.txt": "déjà vu".encode("latin-1"),
        root / "empty.txt": b"",
        root / "sub" / "rows.jsonl": b'{"text": "R"}\n{"text": null}\n{"text": ""}\n',
        root / "sub" / "foreign.jsonl": b'{"messages": []}\n',
        root / "sub" / "broken.jsonl": b"not json\n",
        root / "table.csv": b"a,b\n1,2\n",
        elsewhere / "linked.txt": b"L",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to(tmp_path)
    (root / "gone").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe")
    source = open_source(str(root))
    assert [document.name for document in source.documents()] == ["a.txt", "again/linked.txt", "sub/rows.jsonl:1"]
    left = {reason: entry["names"] for reason, entry in source.findings.facts()["left_out"].items()}
    assert left == {
        "hidden": [".git", ".hidden"],
        "file that is not UTF-8": ["latin.txt"],
        "empty file or row": ["empty.txt", "sub/rows.jsonl:2", "sub/rows.jsonl:3"],
        "JSON Lines without text in the field 'text'": ["sub/broken.jsonl", "sub/foreign.jsonl"],
        "CSV without text in the field 'text'": ["table.csv"],
        "link to a folder that is read already": ["link"],
        "link to a folder that contains it": ["loop", "sub/up"],
        "broken link": ["gone"],
        "not a regular file": ["pipe"],
    }
    list(source.documents())
    assert source.findings.facts()["left_out"]["hidden"]["count"] == 2, "each pass counts anew"


def test_counts_are_stored_in_the_manifest_and_shown_by_info_and_prepare(tmp_path, bardling):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_text("some text\n" * 30)
    (tmp_path / "src" / "b.txt").write_text("other text\n" * 30)
    for number in range(7):
        (tmp_path / "src" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    shown = bardling("prepare", tmp_path / "src", "--out", tmp_path / "ds").stdout
    assert "7 x PNG image (0.png, 1.png, 2.png, 3.png, 4.png, ...)" in shown
    assert "whole documents, of 2, by hash and size (rule 2)" in shown
    assert "left out" in shown


@pytest.mark.parametrize("value", [None, 3, [], {"x": 1}, {"x": {"names": 3}}, {"x": {"count": "many", "names": [1]}}])
def test_findings_from_a_file_are_not_trusted(value):
    assert len(describe_findings({"left_out": value})) <= 1


def test_null_rows_are_skipped_and_later_faults_are_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": null}\n' + lines() + b'{"text": null, "x": 1}\n')
    assert texts(path) == texts(tmp_path) == ["one é", "two"]
    path.write_bytes(lines() + b'{"other": 1}\n')
    for spec in (path, tmp_path):
        with pytest.raises(UserError, match="line 3 has no field 'text'"):
            texts(spec)


def test_damaged_gzip_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines() * 999, compresslevel=0)[:20_000])
    with pytest.raises(UserError, match="damaged gzip data"):
        texts(path)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "secret").mkdir()
    real = Path.iterdir

    def refusing(path):
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(UserError, match=r"secret: cannot read: permission denied"):
        open_source(str(tmp_path))


def test_gzipped_rows_make_the_dataset_of_plain_ones(tmp_path):
    rows = lines([{"text": f"document {number}"} for number in range(9)])
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(rows))
    made = [prepare(str(tmp_path / name), tmp_path / name[0], "byte") for name in ("a.jsonl", "b.json.gz")]
    assert made[0].fingerprint == made[1].fingerprint
