"""Every format gives the same documents, plain and compressed, as a file, in a folder, in an archive and by a URL."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from bardling.config import DataConfig
from bardling.data.text.sources import open_source
from bardling.data.tokens.dataset import changed_text, open_data
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError

ROWS = [{"title": "First", "text": "one é\nline", "n": 1}, {"title": "Second", "text": 'two, "quoted"', "n": 2}]
TEXTS = [row["text"] for row in ROWS]


def table(kind: str, rows=ROWS) -> bytes:
    pyarrow, buffer = pytest.importorskip("pyarrow"), io.BytesIO()
    made = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(made, buffer)
    elif kind == "feather":
        pytest.importorskip("pyarrow.feather").write_feather(made, buffer)
    else:
        with pytest.importorskip("pyarrow.ipc").new_stream(buffer, made.schema) as writer:
            writer.write_table(made)
    return buffer.getvalue()


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv(delimiter=",") -> bytes:
    columns = ["title", "text", "n"]
    quoted = [['"' + str(row[name]).replace('"', '""') + '"' for name in columns] for row in ROWS]
    return "\r\n".join(delimiter.join(cells) for cells in [columns, *quoted]).encode()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


FORMATS = {
    "a.jsonl": lines,
    "a.json": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "small.json": lambda: json.dumps(ROWS).encode(),
    "documents.json": lambda: b"".join(json.dumps(row, indent=1).encode() for row in ROWS),
    "array": lambda: json.dumps(ROWS).encode(),
    "a.csv": csv,
    "semicolons.csv": lambda: csv(";"),
    "a.tsv": lambda: csv("\t"),
    "a.parquet": lambda: table("parquet"),
    "a.feather": lambda: table("feather"),
    "a.arrow": lambda: table("feather"),
    "stream.arrow": lambda: table("stream"),
}
CODECS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def texts(spec, **options) -> list[str]:
    return [document.text for document in open_source(str(spec), **options).documents()]


def tar(members: dict[str, bytes], mode="w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def packed(members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_format(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / f"{name}{codec}"
    path.write_bytes(CODECS[codec](FORMATS[name]()))
    assert texts(path) == texts(tmp_path) == TEXTS
    assert texts(f"{path}:title") == texts(path, field="title") == texts(tmp_path, field="title") == ["First", "Second"]
    assert texts(path, field=r"{title}\n\n{text}") == [f"{row['title']}\n\n{row['text']}" for row in ROWS]
    assert texts(path, field="{n}. {title} {{{n}}}") == ["1. First {1}", "2. Second {2}"]


@pytest.mark.parametrize("codec", CODECS)
def test_text_of_a_codec_under_any_name(tmp_path: Path, codec: str) -> None:
    for name in (f"a.txt{codec}", "a.txt", "a"):
        (tmp_path / name).write_bytes(CODECS[codec]("one\r\né".encode()))
        assert texts(tmp_path / name) == ["one\r\né"]


@pytest.mark.parametrize("make", [tar, lambda members: tar(members, "w:gz"), lambda members: zstd(tar(members)), packed])
def test_archives_are_read_like_folders(tmp_path: Path, make) -> None:
    members = {"b/one.txt": b"one", "a/rows.jsonl": lines(), "t.csv.gz": gzip.compress(csv()), "p.parquet": table("parquet")}
    others = {"b/.hidden": b"x", "../out.txt": b"x", "noise.bin": bytes(range(32)) * 99, "latin.txt": b"caf\xe9 cr\xe8me",
              "e.txt": b"", "inner.zip": packed({"x.txt": b"x"}), "image.png": b"\x89PNG\r\n\x1a\n"}  # fmt: skip
    (tmp_path / "all.zip").write_bytes(make({**members, **others}))
    source = open_source(str(tmp_path / "all.zip"))
    found = list(source.documents())
    assert [document.text for document in found] == ["one", *TEXTS * 3]
    assert [document.name for document in found[:2]] == ["all.zip!b/one.txt", "all.zip!a/rows.jsonl:1"]
    left = {reason: entry["names"] for reason, entry in source.findings.facts()["left_out"].items()}
    assert left == {
        "hidden": ["all.zip!b/.hidden"],
        "member with a path outside the archive": ["all.zip!../out.txt"],
        "binary file": ["all.zip!noise.bin"],
        "file that is not UTF-8": ["all.zip!latin.txt"],
        "empty file or row": ["all.zip!e.txt"],
        "archive inside an archive": ["all.zip!inner.zip"],
        "PNG image": ["all.zip!image.png"],
    }
    assert texts(tmp_path) == texts(tmp_path / "all.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["all.zip"]


def test_a_webdataset_gives_its_texts_or_a_field_of_its_json(tmp_path: Path) -> None:
    samples = {f"{n:06}": {"caption": f"caption {n}", "size": n} for n in range(3)}
    members = {}
    for key, sample in samples.items():
        members |= {f"{key}.jpg": b"\xff\xd8\xff\xe0", f"{key}.txt": f"text of {key}".encode()}
        members |= {f"{key}.json": json.dumps(sample).encode()}
    (tmp_path / "shard-000000.tar").write_bytes(tar(members))
    source = open_source(str(tmp_path / "shard-000000.tar"))
    assert [document.text for document in source.documents()] == [f"text of {key}" for key in samples]
    assert source.findings.facts()["left_out"]["JPEG image"]["count"] == 3
    rows = {name: data for name, data in members.items() if not name.endswith(".txt")}
    (tmp_path / "rows.tar").write_bytes(tar(rows))
    assert texts(tmp_path / "rows.tar", field="caption") == ["caption 0", "caption 1", "caption 2"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_separator_divides_text(tmp_path: Path, codec: str, newline: str) -> None:
    mark = "<|endoftext|>"
    text = newline.join(["Once é.", mark, "Two", "lines.", mark, "", mark, f"in{mark}line", mark, ""])
    (tmp_path / f"a.txt{codec}").write_bytes(CODECS[codec](text.encode()))
    source = open_source(str(tmp_path / f"a.txt{codec}"), separator=mark)
    assert [document.text for document in source.documents()] == ["Once é.", f"Two{newline}lines.", "in", "line"]
    assert source.findings.facts() == {
        "left_out": {"empty document between separators": {"count": 2, "names": [f"a.txt{codec}:3", f"a.txt{codec}:6"]}}
    }
    assert source.identity() != open_source(str(tmp_path / f"a.txt{codec}")).identity()


def test_separators_of_several_lines_across_pieces_and_encodings(tmp_path: Path) -> None:
    parts = [f"paragraph {n} " + "é" * (n * 977 % 5000) for n in range(400)]
    for encoding in ("utf-8", "utf-16", "cp1252"):
        (tmp_path / "a.txt").write_bytes("\n\n".join(parts).encode(encoding))
        assert texts(tmp_path / "a.txt", separator=r"\n\n", encoding="cp1252" if encoding == "cp1252" else "") == parts


def test_a_separator_that_does_not_occur_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    (tmp_path / "rows.jsonl").write_bytes(lines())
    source = open_source(str(tmp_path), separator="<|endoftext|>")
    assert [document.text for document in source.documents()] == ["one\n---\ntwo", *TEXTS]
    assert source.findings.facts()["kept"] == {
        "text file without the separator '<|endoftext|>'": {"count": 1, "names": ["a.txt"]},
        "file with rows, which data.separator does not divide": {"count": 1, "names": ["rows.jsonl"]},
    }


def test_fields_may_be_nested_and_null(tmp_path: Path) -> None:
    rows = [{"meta": {"title": "T", "year": 1999}, "body": None}, {"meta": {"title": None, "year": None}, "body": ""}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = open_source(str(tmp_path / "a.jsonl"), field="{meta.title} ({meta.year}): {body}")
    assert [document.text for document in source.documents()] == ["T (1999): "]
    facts = source.findings.facts()
    assert facts["kept"]["null field of a template"]["count"] == 3
    assert facts["left_out"]["empty file or row"]["names"] == ["a.jsonl:2"]
    assert texts(tmp_path / "a.jsonl", field="meta.title") == ["T"]
    (tmp_path / "a.parquet").write_bytes(table("parquet", rows))
    assert texts(tmp_path / "a.parquet", field="{meta.title}: {meta.year}") == ["T: 1999"]


def test_a_table_without_a_text_column(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("review\ngood\nbad\n")
    assert texts(tmp_path / "one.csv") == ["good", "bad"]
    (tmp_path / "two.csv").write_text("review,stars\ngood,5\nbad\n")
    with pytest.raises(
        UserError, match=r"two.csv: has no column 'text'; it has 'review', 'stars': name the field .*two.csv:FIELD"
    ):
        texts(tmp_path / "two.csv")
    source = open_source(f"{tmp_path / 'two.csv'}:review")
    assert [document.text for document in source.documents()] == ["good"]
    assert source.findings.facts()["left_out"] == {
        "row with more or fewer columns than the header": {"count": 1, "names": ["two.csv:3"]}
    }


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "a.jsonl"])
def test_every_format_makes_the_dataset_of_json_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines())
    (tmp_path / name).write_bytes(FORMATS[name]())
    made = [prepare(str(tmp_path / file), tmp_path / f"{file}-ds", "byte") for file in ("rows.jsonl", name)]
    assert made[0].fingerprint == made[1].fingerprint


def test_rows_are_streamed(tmp_path: Path) -> None:
    """The first rows of an array arrive although its end is damaged."""
    data = json.dumps([{"text": f"text {n} " * 99} for n in range(2000)]).encode()
    (tmp_path / "a.json").write_bytes(data[:-3])
    found = []
    with pytest.raises(UserError, match="is not valid JSON"):
        found += (document.text for document in open_source(str(tmp_path / "a.json")).documents())
    documents = open_source(str(tmp_path / "a.json")).documents()
    assert next(documents).text.startswith("text 0")


def test_templates_and_fields_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    for spec, options, message in (
        ("a.jsonl", {"field": "{title"}, "a brace without its other half"),
        ("a.jsonl", {"field": "n"}, "line 1, field 'n' contains int, not text"),
        ("a.jsonl", {"field": "{titel} {text}"}, r"has no field 'titel' \(did you mean 'title'\?\)"),
        ("a.jsonl:title", {"field": "text2"}, "names another field"),
        ("a.txt", {"field": "title"}, "only rows have fields"),
        ("stdlib", {"separator": "x"}, "omit data.field and data.separator"),
        ("-", {}, "run `bardling prepare - --out DIR`"),
    ):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(UserError, match=message):
            texts(tmp_path / spec if spec not in ("stdlib", "-") else spec, **options)


def test_settings_of_reading_are_part_of_a_cached_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": f"text {n}", "title": f"title {n}"} for n in range(9)]))
    (tmp_path / "b.txt").write_text("one|two|three")
    rows, text = {"source": str(tmp_path / "a.jsonl")}, {"source": str(tmp_path / "b.txt")}
    found = {}
    for settings in (rows, {**rows, "field": "title"}, {**rows, "field": "{title}"}, text, {**text, "separator": "|"}):
        config = DataConfig(**settings, cache=str(tmp_path / "cache"))
        dataset = open_data(config)
        assert open_data(config).path == dataset.path
        assert changed_text(config, dataset) == ""
        found[dataset.path] = dataset.fingerprint
    assert len(found) == 5
    assert open_data(DataConfig(f"{tmp_path / 'a.jsonl'}:title", cache=str(tmp_path / "cache"))).path in found
    assert "has changed" in changed_text(DataConfig(**text), open_data(DataConfig(**text, separator="|", cache=config.cache)))


@pytest.mark.slow
def test_a_text_is_evaluated_with_the_settings_of_reading(tmp_path: Path, bardling) -> None:
    (tmp_path / "a.csv").write_text("review,stars\n" + "".join(f"a review of {n} words,{n}\n" for n in range(40)))
    model = ["--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "1", "--model.block_size", "16"]
    data = ["--data.source", tmp_path / "a.csv", "--data.field", "{review}: {stars}", "--data.cache", tmp_path / "cache"]
    bardling(
        "train",
        "quickstart",
        *data,
        *model,
        "--train.steps",
        "1",
        "--compile",
        "off",
        "--train.batch_size",
        "2",
        "--out",
        tmp_path / "run",
    )
    shown = bardling("eval", tmp_path / "run", "--data", tmp_path / "a.csv", "--field", "review").stdout
    assert "bits per byte" in shown
    failed = bardling("eval", tmp_path / "run", "--data", tmp_path / "a.csv", check=2).stderr
    assert "has no column 'text'; it has 'review', 'stars'" in failed
