"""Fuzzing targets for the file formats of training text: tables, JSON arrays, compressed files, archives.

Each target has one valid file, which is changed by bytes. The documents that are left must be valid text.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from bardling.data.text.sources import open_source
from bardling.errors import UserError
from fuzz_targets import Target

ROWS = [{"title": f"Title {number}", "text": f"Row {number}: naïve café, “quoted”.\n", "n": number} for number in range(20)]


def _lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def _csv(delimiter: str) -> bytes:
    cells = [["title", "text", "n"], *([row["title"], f'"{row["text"]}"', str(row["n"])] for row in ROWS)]
    return "\r\n".join(delimiter.join(map(str, row)) for row in cells).encode()


def _table(kind: str) -> bytes:
    import pyarrow
    import pyarrow.feather
    import pyarrow.ipc
    import pyarrow.parquet

    buffer, made = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        pyarrow.parquet.write_table(made, buffer, row_group_size=7)
    elif kind == "file":
        pyarrow.feather.write_feather(made, buffer, compression="uncompressed")
    else:
        with pyarrow.ipc.new_stream(buffer, made.schema) as writer:
            writer.write_table(made)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


MEMBERS = {
    "a.txt": "A text, naïve.\n".encode() * 9,
    "deep/rows.jsonl": _lines(),
    "rows.csv": _csv(","),
    "n.json": b'{"text": "x"}',
}
FILES: dict[str, Callable[[], bytes]] = {
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "rows.csv": lambda: _csv(","),
    "rows.tsv": lambda: _csv("\t"),
    "rows.parquet": lambda: _table("parquet"),
    "rows.feather": lambda: _table("file"),
    "rows.arrow": lambda: _table("stream"),
    "rows.jsonl.gz": lambda: gzip.compress(_lines()),
    "rows.jsonl.bz2": lambda: bz2.compress(_lines()),
    "rows.jsonl.xz": lambda: lzma.compress(_lines()),
    "rows.jsonl.zst": lambda: _zstd(_lines()),
    "all.tar": _tar,
    "all.tar.gz": lambda: gzip.compress(_tar()),
    "all.zip": _zip,
    "stories.md": lambda: "Once, naïve.\n<|endoftext|>\n".encode() * 20,
}


def make_files(folder: Path) -> None:
    """A file of each format."""
    for name, make in FILES.items():
        (folder / name).write_bytes(make())


def _load(name: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        path = folder / name
        if path.is_file() and path.stat().st_size > 1 << 26:
            raise UserError(f"{path}: is larger than this target reads")
        separator = "<|endoftext|>" if name.endswith(".md") else ""
        for document in open_source(str(path), separator=separator).documents():
            document.text.encode()  # raises an error for half a surrogate pair

    return load


FORMAT_TARGETS = tuple(Target(f"source, {name}", 4, make_files, (name,), _load(name)) for name in FILES)
