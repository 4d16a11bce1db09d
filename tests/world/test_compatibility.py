"""docs/compatibility.md shows the outcomes of the cases here. Each case makes a small real file, hands it to the package and
compares what comes back with other software; a refusal is on the page word for word.

After a change, `BARDLING_WRITE_DOCS=1 pytest tests/world/test_compatibility.py` writes the page again.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from compatibility_models import MODELS, WRITTEN
from compatibility_tokenizers import TOKENIZERS, Run
from test_files_and_folders import archive, lines, table

from bardling.data.text.findings import describe_findings
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.token_files import open_token_folder
from bardling.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PLAIN = "It costs a lot.\r\nTwo lines, 日本 👍.\n"
WESTERN = "Le café était fermé, déjà; l’œuvre coûte 5 €.\n"
ROWS = ["one é", "two"]  # of `lines`
END = 256  # the end-of-text token of 'byte'
IDS = [5, 0, 3, 1, 2, 4]

# ---- Text: the bytes of the dataset are those of the text ----


def text(
    folder: Path,
    name: str,
    data: bytes | Callable[[], bytes],
    *expected: str,
    field: str = "",
    template: str = "",
    **options: Any,
) -> str:
    """A file, or with more than one text its rows, named as a source."""
    options |= {"field": template} if template else {}
    (folder / name).write_bytes(data if isinstance(data, bytes) else data())
    return prepared(folder, f"{folder / name}{field}", *expected, **options)


def prepared(folder: Path, spec: str, *expected: str, **options: Any) -> str:
    dataset = prepare(spec, folder / "dataset", "byte", val_fraction=0.5, **options)
    splits = [dataset.split(name) for name in ("train", "val")]
    ids = [token for split in splits for token in split.read(0, len(split)).tolist()]
    documents = [[]]
    for token in ids:
        documents[-1].append(token)
        if token == END:
            documents.append([])
    found = sorted(bytes(token for token in document if token != END).decode() for document in documents if document)
    assert found == sorted(expected)
    return "; ".join(["read" if len(found) == 1 else f"read, {len(found)} documents", *facts(dataset.manifest.source)])


def facts(source: Any) -> list[str]:
    return describe_findings({key: source[key] for key in ("left_out", "kept") if key in source})


def folder_of_files(folder: Path) -> str:
    root = folder / "notes"
    for name, data in {
        "a.txt": b"one",
        "deep/b.md": b"two",
        "rows.jsonl": lines(),
        "table.csv": b"a,b\n1,2\n",
        "latin.txt": WESTERN.encode("cp1252"),
        "noise.dat": bytes(range(32)) * 9,
        "empty.txt": b"",
        ".hidden.txt": b"secret",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return prepared(folder, str(root), "one", "two", *ROWS)


def made_folder(folder: Path, *names: str) -> str:
    (folder / "made").mkdir()
    for name in names:
        (folder / "made" / name).write_bytes(b"x")
    return prepared(folder, str(folder / "made"))


def several(folder: Path) -> str:
    for name in ("a.txt", "b.txt", "c.md"):
        (folder / name).write_text(name)
    return prepared(folder, f"{folder}/*.txt", "a.txt", "b.txt")


def document(rows: Any, **options: Any) -> bytes:
    return json.dumps(rows, **options).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))


CSV = b'text,body\r\n"one, \n1",B1\r\n'
TEXTS: dict[str, Run] = {
    "`.txt`, UTF-8, with line ends of Windows": lambda f: text(f, "a.txt", PLAIN.encode(), PLAIN),
    "NUL characters in UTF-8": lambda f: text(f, "a.txt", b"one\0two", "one\0two"),
    "`.md`": lambda f: text(f, "a.md", b"# Title\n", "# Title\n"),
    "`.html`, with its tags": lambda f: text(f, "a.html", b"<p>text</p>", "<p>text</p>"),
    "a file without a suffix": lambda f: text(f, "notes", b"text\n", "text\n"),
    "UTF-8 with a byte order mark": lambda f: text(f, "a.txt", PLAIN.encode("utf-8-sig"), PLAIN),
    "UTF-16 with a byte order mark": lambda f: text(f, "a.txt", b"\xff\xfe" + PLAIN.encode("utf-16-le"), PLAIN),
    "UTF-16 without a mark": lambda f: text(f, "a.txt", "plain text, wide\n".encode("utf-16-le")),
    "cp1252": lambda f: text(f, "a.txt", WESTERN.encode("cp1252")),
    "cp1252 with `data.encoding = 'cp1252'`": lambda f: text(f, "a.txt", WESTERN.encode("cp1252"), WESTERN, encoding="cp1252"),
    "cp1251": lambda f: text(f, "a.txt", "Привет, мир".encode("cp1251")),
    "UTF-8 with `data.encoding = 'shift_jis'`": lambda f: text(f, "a.txt", WESTERN.encode(), encoding="shift_jis"),
    "`.jsonl`": lambda f: text(f, "a.jsonl", lines(), *ROWS),
    "`.jsonl` with a field: `a.jsonl:body`": lambda f: text(f, "a.jsonl", lines(), "B1", "B2", field=":body"),
    "`.jsonl` without the field `text`": lambda f: text(f, "a.jsonl", document({"content": "x"})),
    "`.jsonl` with chats": lambda f: text(f, "a.jsonl", document({"messages": [{"role": "user", "content": "x"}]})),
    "`.jsonl` with a row that is null": lambda f: text(f, "a.jsonl", lines() + b'{"text": null}\n', *ROWS),
    "`.jsonl` with a damaged line": lambda f: text(f, "a.jsonl", lines() + b'{"text": "thr\n'),
    "`.jsonl` in cp1252": lambda f: text(f, "a.jsonl", '{"text": "é"}\n'.encode("cp1252")),
    "`.ndjson`": lambda f: text(f, "a.ndjson", lines(), *ROWS),
    "JSON Lines in a `.json`": lambda f: text(f, "a.json", lines(), *ROWS),
    "JSON Lines in a `.txt`": lambda f: text(f, "a.txt", lines(), *ROWS),
    "`.jsonl.gz`": lambda f: text(f, "a.jsonl.gz", gzip.compress(lines()), *ROWS),
    "a truncated `.jsonl.gz`": lambda f: text(f, "a.jsonl.gz", gzip.compress(lines() * 99)[:-9]),
    "`.json`, an array": lambda f: text(f, "a.json", document([{"text": ROWS[0]}, {"text": ROWS[1]}], indent=1), *ROWS),
    "a truncated array": lambda f: text(f, "a.json", document([{"text": "x"}, {"text": "y"}])[:-4]),
    "`.json`, a document with the field `text`": lambda f: text(f, "a.json", document({"text": "x"}, indent=1), "x"),
    "`.json`, another document": lambda f: text(f, "a.json", document({"a": {"b": 1}}, indent=1)),
    "`.csv`": lambda f: text(f, "a.csv", CSV, "one, \n1"),
    "`.csv` with a template: `--field '{text} ({body})'`": lambda f: text(
        f, "a.csv", CSV, "one, \n1 (B1)", template="{text} ({body})"
    ),
    "`.csv` without a column `text`": lambda f: text(f, "a.csv", b"review,stars\ngood,5\n"),
    "`.tsv`": lambda f: text(f, "a.tsv", b"text\tbody\none\tB1\n", "one"),
    "`.parquet`": lambda f: text(f, "a.parquet", table("parquet"), *ROWS),
    "`.arrow`": lambda f: text(f, "a.arrow", table("feather"), *ROWS),
    "`.txt.gz`": lambda f: text(f, "a.txt.gz", gzip.compress(b"text"), "text"),
    "`.txt.xz`": lambda f: text(f, "a.txt.xz", lzma.compress(b"text"), "text"),
    "`.jsonl.zst`": lambda f: text(f, "a.jsonl.zst", zstd(lines()), *ROWS),
    "a truncated `.jsonl.zst`": lambda f: text(f, "a.jsonl.zst", zstd(lines() * 99)[:-9]),
    "a decompression bomb": lambda f: text(f, "a.txt.gz", gzip.compress(bytes(8 << 20)) * 33),
    "`.zip`": lambda f: text(f, "a.zip", archive("zip"), "text"),
    "`.tar`": lambda f: text(f, "a.tar", archive("tar"), "text"),
    "`.tar.gz`": lambda f: text(f, "a.tar.gz", gzip.compress(archive("tar")), "text"),
    "`.txt` with `--separator '<|endoftext|>'`": lambda f: text(
        f, "a.txt", b"one<|endoftext|>two", "one", "two", separator="<|endoftext|>"
    ),
    "`.pdf`": lambda f: text(f, "a.pdf", b"%PDF-1.7\n"),
    "`.docx`": lambda f: text(f, "a.docx", archive("zip")),
    "`.7z`": lambda f: text(f, "a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(30)),
    "`.png`": lambda f: text(f, "a.png", b"\x89PNG\r\n\x1a\n" + bytes(30)),
    "`.gguf`": lambda f: text(f, "a.gguf", b"GGUF\x03\0\0\0" + bytes(30)),
    "another binary file": lambda f: text(f, "a.bin", bytes(range(256)) * 9),
    "an empty `.txt`": lambda f: text(f, "a.txt", b""),
    "an empty `.json`": lambda f: text(f, "a.json", b""),
    "a folder": folder_of_files,
    "a glob: `*.txt`": several,
    "an empty folder": made_folder,
    "a model folder": lambda f: made_folder(f, "config.json", "model.safetensors"),
    "a prepared dataset, as the argument of `prepare`": lambda f: made_folder(f, "manifest.json", "train-00000.bin"),
    "a run folder": lambda f: made_folder(f, "config.toml", "metrics.jsonl"),
    "a missing file": lambda f: prepared(f, str(f / "absent.txt")),
}

# ---- Token files: the ids that were written ----


def token_files(folder: Path, files: dict[str, bytes], meta: Any = None) -> str:
    (folder / "data").mkdir()
    for name, data in files.items():
        (folder / "data" / name).write_bytes(data)
    if meta:
        (folder / "data" / "meta.pkl").write_bytes(pickle.dumps(meta))
    dataset = open_token_folder(folder / "data")
    for split in (dataset.split("train"), dataset.split("val")):
        assert split.read(0, len(split)).tolist() == IDS
    return f"read, {dataset.vocab_size:,} token ids"


def array(ids: list[int], dtype: str = "<u2") -> bytes:
    return np.array(ids, dtype).tobytes()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(IDS, np.uint16))
    return buffer.getvalue()


def llmc(magic: int, version: int, dtype: str) -> bytes:
    return struct.pack("<256i", magic, version, len(IDS), *[0] * 253) + array(IDS, dtype)


def both(data: bytes, train: str, val: str) -> dict[str, bytes]:
    return {train: data, val: data}


CHARACTERS = {"vocab_size": 6, "itos": dict(enumerate("abcdef")), "stoi": {c: i for i, c in enumerate("abcdef")}}
NANO = both(array(IDS), "train.bin", "val.bin")
TOKEN_FILES: dict[str, Run] = {
    "nanoGPT's `train.bin` and `val.bin`": partial(token_files, files=NANO),
    "the same with a `meta.pkl` of characters": partial(token_files, files=NANO, meta=CHARACTERS),
    "the same with an id outside the vocabulary": partial(token_files, files={**NANO, "val.bin": array([9])}, meta=CHARACTERS),
    "`train.bin` without `val.bin`": partial(token_files, files={"train.bin": array(IDS)}),
    "a `train.bin` with an odd number of bytes": partial(token_files, files={**NANO, "train.bin": array(IDS)[:-1]}),
    "nano-gpt's `NAME_train.npy.000.npy`": partial(
        token_files, files=both(npy(), "plays_train.npy.000.npy", "plays_validation.npy.000.npy")
    ),
    "llm.c's `NAME_train_000001.bin`, GPT-2": partial(
        token_files, files=both(llmc(20240520, 1, "<u2"), "web_train_000001.bin", "web_val_000000.bin")
    ),
    "llm.c's `NAME_train_000001.bin`, Llama 3": partial(
        token_files, files=both(llmc(20240801, 7, "<u4"), "web_train_000001.bin", "web_val_000000.bin")
    ),
    "llm.c's files with another header": partial(
        token_files, files=both(llmc(20240520, 2, "<u2"), "web_train_000001.bin", "web_val_000000.bin")
    ),
}

# ---- The page ----

INTRO = """# Compatibility

What Bardling reads, writes and refuses. A test makes each of these inputs, gives it to Bardling and compares the result with
other software. The tables are its outcomes: refusals are quoted, with paths shortened to the name of the file. To generate the
page again, run `BARDLING_WRITE_DOCS=1 pytest tests/world/test_compatibility.py`.
"""


class Section(NamedTuple):
    about: str
    cases: dict[str, Run]


SECTIONS = {
    "Tokenizers": Section(
        """\
`data.tokenizer`, or the tokenizer in a model folder. *Read* means that documents and prompts get the ids of `AutoTokenizer`
or of the `tokenizers` library, and that decoding gives the same text. Unless the row says otherwise, the input is a
`tokenizer.json`.""",
        TOKENIZERS,
    ),
    "Models": Section(
        """\
`model.init`, and the argument of `sample`, `eval` and `export`. *Read* means that the logits equal those of `transformers`
within 1e-4. Unless the row says otherwise, the input is a folder written by `save_pretrained`.""",
        MODELS,
    ),
    "Text": Section(
        """\
`data.source`, and the argument of `prepare`. *Read* means that the tokens decode to the text, byte for byte. The rules are in
[Training text](data.md).""",
        TEXTS,
    ),
    "Token files": Section(
        "Folders of other trainers, as `data.source`. *Read* means that the token ids are those in the files.", TOKEN_FILES
    ),
    "Written formats": Section(
        """\
`bardling export`; checkpoints of a run contain the same files. *Written* means that `transformers` finds the logits, ids or
settings of the original in the result. Unless the row says otherwise, that is a folder for `from_pretrained`.""",
        WRITTEN,
    ),
}
CASES = [(section, what) for section, (_, cases) in SECTIONS.items() for what in cases]
WRITING = os.environ.get("BARDLING_WRITE_DOCS") == "1"
rows: dict[tuple[str, str], str] = {}  # of this process


def outcome(section: str, what: str, folder: Path) -> str:
    try:
        found = SECTIONS[section].cases[what](folder)
    except UserError as error:
        found = f"refused: `` {error} ``"
    return shortened(found, folder)


def shortened(message: str, folder: Path) -> str:
    """Without the folders of paths, and without the reasons that other libraries give."""
    message = re.sub(re.escape(str(folder)) + r"/(?:[\w.-]+/)*", "", message)
    return re.sub(r"(safetensors file|readable tokenizer|JSON|gzip data|Zstandard data) \(.*\)", r"\1 (...)", message)


def row(what: str, found: str) -> str:
    return f"| {cell(what)} | {cell(found)} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def rendered(found: Callable[[str, str], str]) -> str:
    """The page, with the row that `found` gives for each case."""
    parts = [INTRO]
    for section, (about, cases) in SECTIONS.items():
        table = [found(section, what) for what in cases]
        lines = [f"## {section}", "", about, "", "| input | outcome |", "| --- | --- |", *table]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def on_the_page(section: str, what: str) -> str:
    """The row of a case."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return next((line for line in lines if line.startswith(f"| {cell(what)} | ")), f"no row for {what!r}")


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of GPT-2's tokenizer on this machine would change outcomes."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))


@pytest.mark.parametrize(("section", "what"), CASES, ids=[f"{section}: {what}" for section, what in CASES])
def test_an_outcome_is_that_of_the_page(section: str, what: str, tmp_path: Path) -> None:
    rows[section, what] = found = row(what, outcome(section, what, tmp_path))
    assert "\n" not in found
    assert WRITING or on_the_page(section, what) == found


def test_the_page_has_these_rows_and_no_others() -> None:
    if WRITING:
        PAGE.write_text(rendered(lambda section, what: rows[section, what]), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == rendered(on_the_page)
