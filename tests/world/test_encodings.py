"""Text files in other encodings are read as their author meant them, or refused with a remedy that works when it is run."""

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest

from bardling.config import DataConfig
from bardling.config.recipes import load_recipe
from bardling.data.text.sources import open_source
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError
from bardling.files.decoding import decode_text
from bardling.files.reading import read_small_text

TEXT = "Ein Café\r\nnaïve – ‘quotes’\r\n\n日本語 🙂\n"
WESTERN = "Le café était fermé, déjà; l’œuvre coûte 5 €.\r\nNaïve façade.\n"


def texts(path: Path, encoding: str = "") -> list[str]:
    return [document.text for document in open_source(str(path), encoding).documents()]


def ids(path: Path, out: Path, **options) -> list[int]:
    dataset = prepare(str(path), out, "byte", val_fraction=0.1, **options)
    return [token for split in ("train", "val") for token in dataset.split(split).read(0, len(dataset.split(split))).tolist()]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
        (b"\xff\xfe\0\0", "utf-32-le"),
        (b"\0\0\xfe\xff", "utf-32-be"),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_a_byte_order_mark_decides_and_is_no_token(tmp_path, mark, encoding, rows):
    written = json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" if rows else TEXT
    path = tmp_path / ("a.jsonl" if rows else "a.txt")
    path.write_bytes(mark + written.encode(encoding))
    assert texts(path) == [TEXT]
    assert bytes(ids(path, tmp_path / "ds")) == TEXT.encode()


@pytest.mark.parametrize(
    "encoding", ["cp1252", "latin-1", "cp1251", "shift_jis", "gb18030", "koi8-r", "mac-roman", "utf-16-le"]
)
def test_a_named_encoding_is_used(tmp_path, encoding):
    text = {"cp1251": "Привет, мир\n", "koi8-r": "Привет\n", "shift_jis": "日本語\r\n", "gb18030": "中文\n"}.get(
        encoding, "déjà vu\n"
    )
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "rows.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    assert texts(tmp_path / "a.txt", encoding) == texts(tmp_path / "rows.jsonl", encoding) == [text]
    assert bytes(ids(tmp_path / "a.txt", tmp_path / "ds", encoding=encoding)) == text.encode()


def test_a_mark_is_stronger_than_the_named_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert texts(tmp_path / "a.txt", "cp1252") == [TEXT]


@pytest.mark.parametrize("text", ["a\0b\n", "\0" * 9, "line\r\nline\rline\n", "x\ufeffy", "tab\tform\ffeed", "\x1b[0m", " \n "])
def test_unusual_characters_stay(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts(tmp_path / "a.txt") == [text]


def test_unusual_characters_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\0two\0\xef\xbb\xbfthree " + b"word " * 99)
    dataset = prepare(str(tmp_path / "a.txt"), tmp_path / "ds", "byte")
    kept = dataset.manifest.source["kept"]
    assert kept["NUL character"] == {"count": 2, "names": ["a.txt"]}
    assert kept["U+FEFF inside a text"]["count"] == 1


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff\ufeff"])
def test_marks_in_rows_are_no_tokens(tmp_path, text):
    first = json.dumps({"text": text + "one"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + first + b"\n\xef\xbb\xbf" + first + b"\n")
    assert texts(tmp_path / "a.jsonl") == ["one", "one"]


def run_remedy(message: str, folder: Path) -> None:
    """Run the command that a message quotes."""
    command = re.search(r"`(.+)`", message)
    assert command is not None, message
    subprocess.run(["bash", "-c", command[1].replace("NEW", "new.txt")], cwd=folder, check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", WESTERN.encode("cp1252"), "looks like cp1252: set --data.encoding cp1252, or convert it, `iconv -f CP1252 "),
        ("my file's.txt", WESTERN.encode("cp1252"), "byte 6 is 0xe9"),
        ("b.txt", b"\xff\xfe" + b"abc", "byte order mark of UTF-16-LE but is not"),
        (
            "c.txt",
            "plain text, wide\n".encode("utf-16-le"),
            "looks like UTF-16-LE without a byte order mark: set --data.encoding",
        ),
        ("d.txt", "plain text, wide\n".encode("utf-16-be"), "utf-16-be"),
        ("e.txt", "plain text, wide\n".encode("utf-32-le"), "utf-32-le"),
        ("f.txt", "Привет, мир, это текст".encode("cp1251"), "where ENCODING is for example cp1251"),
        ("g.jsonl", json.dumps({"text": WESTERN}, ensure_ascii=False).encode("cp1252"), "line 1 is not JSON in UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_what_they_look_like(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", WESTERN), ("utf-16-le", "wide text\n"), ("utf-32-be", "wide text\n")]
)
def test_both_remedies_work(tmp_path, encoding, text):
    path = tmp_path / "it's.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as caught:
        texts(path)
    option = re.search(r"--data.encoding (\S+),", str(caught.value))
    assert option is not None
    assert texts(path, option[1]) == [text]
    run_remedy(str(caught.value), tmp_path)
    assert texts(tmp_path / "new.txt") == [text]


@pytest.mark.parametrize("name", ["utf-9", "hex", "rot13", "base64", "cp12", "\0"])
def test_an_unknown_encoding_is_refused_at_once(name):
    with pytest.raises(UserError, match=r"data\.encoding = "):
        DataConfig(encoding=name)


@pytest.mark.parametrize("spec", ["shakespeare", "stdlib", "hf:me/data"])
def test_sources_that_know_their_encoding_refuse_another(tmp_path, spec):
    if spec == "stdlib":
        pytest.skip("files of the standard library are files")
    with pytest.raises(UserError, match=r"data\.encoding = 'cp1252'"):
        prepare(spec, tmp_path / "ds", "byte", encoding="cp1252")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_recipes_and_small_files_follow_the_same_rule(tmp_path, encoding):
    path = tmp_path / "recipe.toml"
    path.write_bytes('# é\r\n[data]\r\nsource = "é.txt"\r\n'.encode(encoding))
    assert load_recipe(str(path)).data.source == "é.txt"
    assert read_small_text(path).startswith("# é\n[data]")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"[data]", mtime=0), "is gzip data, not text: decompress it"),
        ("# é".encode("cp1252"), "is not UTF-8 text (byte 2 is 0xe9)"),
    ],
)
def test_a_recipe_that_is_not_text_is_named(tmp_path, data, message):
    (tmp_path / "recipe.toml").write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "recipe.toml"))
    assert message in str(caught.value)
    assert "data.encoding" not in str(caught.value)


def test_utf_16_that_begins_with_nul_is_not_utf_32():
    assert decode_text(b"\xff\xfe" + "\0abc".encode("utf-16-le"), "x") == "\0abc"
    assert decode_text(b"\xff\xfe\0\0" + "abc".encode("utf-32-le"), "x") == "abc"


def test_a_folder_read_in_another_encoding_leaves_images_out_and_reports_utf_8(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_bytes(WESTERN.encode("cp1252"))
    (tmp_path / "src" / "b.txt").write_bytes("déjà".encode())
    (tmp_path / "src" / "noise.dat").write_bytes(bytes(range(256)) * 9)
    source = open_source(str(tmp_path / "src"), "latin-1")
    assert [document.name for document in source.documents()] == ["a.txt", "b.txt"]
    facts = source.findings.facts()
    assert facts["left_out"] == {"binary file": {"count": 1, "names": ["noise.dat"]}}
    assert facts["kept"]["file that is also valid UTF-8, read as latin-1"]["names"] == ["b.txt"]
