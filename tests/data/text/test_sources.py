"""Sources: which documents, in which order, and what is said when there are none."""

import json
import os
from pathlib import Path

import pytest

from bardling.data.text.sources import open_source
from bardling.errors import UserError


def texts(spec: Path | str) -> list[str]:
    return [document.text for document in open_source(str(spec)).documents()]


def test_stdlib_is_sorted_code_without_tests() -> None:
    source = open_source("stdlib")
    names = [document.name for document in source.documents()]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert 5_000_000 < source.size() < 30_000_000
    assert source.identity() == open_source("stdlib").identity()


def test_a_file_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n\u2028é".encode())
    (document,) = open_source(str(tmp_path / "a.txt")).documents()
    assert document == ("a.txt", "one\r\ntwo\n\u2028é")


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name, data in {
        "b.md": b"B",
        "sub/a.txt": b"A",
        "a.py": b"P",
        ".hidden": b"H",
        ".git/x.txt": b"G",
        "image.png": b"\x89PNG\xff\xfe",
        "zeros.bin": b"a\0b",
        "empty.txt": b"",
        "rows.jsonl": b'{"text": "J1"}\n\n{"text": "J2"}\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert texts(tmp_path) == ["P", "B", "J1", "J2", "A"]


def test_a_glob_takes_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "x/3.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "**" / "*.txt") == ["x/1.txt", "x/y/2.txt"]
    monkeypatch.chdir(tmp_path)
    assert texts("x/*.txt") == ["x/1.txt"]
    with pytest.raises(UserError, match=r"\*\.rst.*no file matches"):
        open_source("x/*.rst")


def test_jsonl_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "body": f"b{i}"}) + "\n" for i in range(3)))
    assert texts(path) == ["t0", "t1", "t2"]
    assert texts(f"{path}:body") == ["b0", "b1", "b2"]
    assert texts(f"{tmp_path}:body") == ["b0", "b1", "b2"]
    assert texts(f"{tmp_path}/*.jsonl:body") == ["b0", "b1", "b2"]
    assert open_source(f"{path}:body").identity() != open_source(str(path)).identity()
    with pytest.raises(UserError, match=r"rows.jsonl: line 1 has no field 'bodi' \(did you mean 'body'\?\).*'text', 'body'"):
        texts(f"{path}:bodi")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 2 is not JSON"),
        (b"[1]", "line 2 is not a JSON object"),
        (b'{"text": 5}', "line 2, field 'text' contains int"),
        (b'{"other": "x"}', "line 2 has no field 'text'"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        texts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud800b\\ud83d\\udc4d"}\n')
    assert texts(tmp_path / "rows.jsonl") == ["a\ufffdb👍"]


def test_missing_sources_say_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "manifest.json").write_text("{}")
    (tmp_path / "ds" / "train-00000.bin").write_text("")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec, message in {
        "corpos.txt": "did you mean 'corpus.txt'",
        "stdlip": "did you mean 'stdlib'",
        "nowhere/a.txt": "folder nowhere does not exist",
        "bare": "has no files",
        "ds": "is a prepared dataset",
        "corpus.txt:body": "only rows have fields",
        os.devnull: "neither a file nor a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)


def test_what_is_not_text_or_empty(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"latin.txt: is not UTF-8 text \(byte 3 is 0xe9\).*iconv"):
        texts(tmp_path / "latin.txt")
    with pytest.raises(UserError, match=r"empty.txt: is empty"):
        texts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="none of its 2 files contains UTF-8 text"):
        texts(tmp_path)


def test_identity_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    seen = [open_source(str(tmp_path)).identity()]
    assert open_source(str(tmp_path)).identity() == seen[0]
    path.write_text("two!")
    seen.append(open_source(str(tmp_path)).identity())
    os.utime(path, ns=(1, 1))
    seen.append(open_source(str(tmp_path)).identity())
    (tmp_path / "b.txt").write_text("more")
    seen.append(open_source(str(tmp_path)).identity())
    assert len(set(seen)) == 4
