"""Files under any name are read as text or JSON Lines, or refused by name; a folder counts what it leaves out."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
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
            file.addfile(tarfile.TarInfo("x.txt"), io.BytesIO(b""))
    return buffer.getvalue()


FORMATS = {
    "array.json": (lambda: json.dumps(ROWS, indent=1).encode(), "a JSON array"),
    "minified.json": (lambda: json.dumps(ROWS).encode(), "a JSON array"),
    "object.json": (lambda: json.dumps({"rows": ROWS}, indent=1).encode(), "a JSON document"),
    "single.json": (lambda: b'{"name": "package"}', "a JSON document"),
    "book.ipynb": (lambda: json.dumps({"cells": []}, indent=1).encode(), "a JSON document"),
    "table.csv": (lambda: b'text,body\r\n"one, \n1",B1\r\ntwo,B2\r\n', "a CSV table"),
    "TABLE.CSV": (lambda: b"text,body\ntwo,B2\n", "a CSV table"),
    "table.tsv": (lambda: b"text\tbody\ntwo\tB2\n", "a TSV table"),
    "plain.txt.gz": (lambda: gzip.compress(b"plain text\n", mtime=0), "gzip data"),
    "plain.txt": (lambda: gzip.compress(b"plain text\n", mtime=0), "gzip data"),
    "rows.jsonl.zst": (lambda: b"\x28\xb5\x2f\xfd" + bytes(30), "Zstandard data"),
    "rows.jsonl.xz": (lambda: b"\xfd7zXZ\0" + bytes(30), "xz data"),
    "rows.jsonl.bz2": (lambda: b"BZh91AY&SY" + bytes(30), "bzip2 data"),
    "rows.parquet": (lambda: table("parquet"), "a Parquet file"),
    "rows.arrow": (lambda: table("feather"), "an Arrow file"),
    "all.zip": (lambda: archive("zip"), "a zip archive"),
    "all.tar": (lambda: archive("tar"), "a tar archive"),
    "paper.pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3\n", "a PDF file"),
    "picture.png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(30), "a PNG image"),
    "other.jsonl": (lambda: lines([{"content": "x"}]), None),
    "content.txt": (lambda: lines([{"content": "x"}]), "a JSON Lines file without the field 'text'"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_by_name_and_counted_in_a_folder(tmp_path, name):
    make, kind = FORMATS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert (kind or "has no field 'text'") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "text.txt").write_text("text")
    source = open_source(str(tmp_path))
    assert [document.text for document in source.documents()] == ["text"]
    (entry,) = source.findings.facts()["left_out"].values()
    assert entry == {"count": 1, "names": [name]}


@pytest.mark.parametrize(
    "name", ["array.json", "table.csv", "TABLE.CSV", "table.tsv", "rows.parquet", "rows.arrow", "plain.txt.gz"]
)
def test_the_remedy_works(tmp_path, name, monkeypatch):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / name).write_bytes(FORMATS[name][0]())
    with pytest.raises(UserError) as caught:
        texts(folder / name)
    command = re.search(r"`(.+)`", str(caught.value))
    assert command is not None
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["bash", "-c", command[1]], check=True, timeout=60)
    (new,) = (path for path in folder.iterdir() if path.name != name)
    wanted = {"plain.txt.gz": ["plain text\n"], "table.csv": ["one, \n1", "two"], "TABLE.CSV": ["two"], "table.tsv": ["two"]}
    assert texts(new) == wanted.get(name, ["one é", "two"])


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
        root / "table.csv": b"a,b\n",
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
        "CSV table": ["table.csv"],
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
