"""`manifest.json`: the contents of a dataset folder, with a checksum of each file and a digest of the manifest itself.

A manifest may come from anywhere, so it is checked field by field before anything is allocated or opened: file names are plain,
sizes agree with token counts, and the digest matches the content.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bardling.errors import UserError
from bardling.files.atomic import write_atomically
from bardling.files.digests import json_sha256
from bardling.files.reading import read_json_object

FORMAT = 1
SplitName = Literal["train", "val"]
Dtype = Literal["uint16", "uint32"]
_MAX_BYTES = 64 << 20  # about 400,000 files
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # never a path that leaves the folder


def token_dtype(vocab_size: int) -> Dtype:
    """The narrowest integer type that fits every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardFile:
    name: str
    tokens: int
    size: int  # bytes of the whole file
    sha256: str  # of the whole file; empty if unknown
    offset: int = 0  # bytes before the first token


@dataclass(frozen=True)
class IndexFile:
    """A file of the document index: where documents begin, or their names (`documents.py`)."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    tokens: int
    documents: int
    bytes: int  # of the text in UTF-8; 0 if unknown
    files: tuple[ShardFile, ...]
    index: tuple[IndexFile, ...] = ()  # where documents begin, and their names; empty in datasets of versions without an index
    marks: tuple[ShardFile, ...] = ()  # of conversations: a number for each token (`conversations.py`), as 16-bit integers


@dataclass(frozen=True)
class Manifest:
    dtype: Dtype
    vocab_size: int
    tokenizer: str  # its fingerprint; empty if the dataset has none
    source: Mapping[str, Any]  # origin of the text: spec, identity, and how it was split
    val_fraction: float
    train: SplitInfo
    val: SplitInfo
    format: int = FORMAT
    row: int = 0  # tokens of each packed row of conversations or documents; 0: text, which is cut anywhere

    def split(self, name: SplitName) -> SplitInfo:
        return self.train if name == "train" else self.val

    @property
    def holds_conversations(self) -> bool:
        """Whether the rows are of conversations, and not of documents (`pack_documents.py`)."""
        return self.row > 0 and "packing" not in self.source

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens and their vocabulary; equal for equal data, wherever and whenever it was prepared."""
        splits = (self.train, self.val)
        files = [[[file.sha256 or file.name, file.tokens] for file in split.files] for split in splits]
        content: dict[str, Any] = {
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "files": files,
        }
        if self.row:
            content |= {"row": self.row, "marks": [[file.sha256 for file in split.marks] for split in splits]}
        return _digest(content)[:16]


def _digest(content: Any) -> str:
    return json_sha256(content, sort_keys=True, separators=(",", ":"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, including a digest of everything else in it. It comes last: it makes the folder a dataset."""
    content = asdict(manifest)
    write_atomically(folder / "manifest.json", json.dumps({**content, "digest": _digest(content)}, indent=1).encode() + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, but not its files; a `UserError` if it is missing, damaged, edited or of another format."""
    if not path.is_file():
        fault = f"not found, so {path.parent} is not a prepared dataset"
        raise UserError(f"{path}: {fault}: make one with `bardling prepare SOURCE --out DIR`")
    remedy = "prepare the dataset again"
    try:
        content = read_json_object(path, limit=_MAX_BYTES)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')!r} is not supported, only {FORMAT}: {remedy}")
    if content.pop("digest", None) != _digest(content):
        raise UserError(f"{path}: its digest does not match its content, so it was edited or damaged: {remedy}")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is not a valid manifest ({error}): {remedy}") from error


def _parse(content: dict[str, Any]) -> Manifest:
    """The manifest in `content`; a ValueError, KeyError or TypeError names the first invalid field."""
    dtype, vocab_size = content["dtype"], _count(content, "vocab_size")
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {dtype!r} is neither 'uint16' nor 'uint32'")
    if not 1 <= vocab_size <= 1 << (16 if dtype == "uint16" else 32):
        raise ValueError(f"a vocabulary of {vocab_size} does not fit {dtype}")
    if not isinstance(content["tokenizer"], str) or not isinstance(content["source"], dict):
        raise ValueError("tokenizer must be a string and source an object")
    train, val = (_split(content[name], width=2 if dtype == "uint16" else 4) for name in ("train", "val"))
    row = _count(content, "row") if "row" in content else 0
    if row and any(split.tokens % row or sum(file.tokens for file in split.marks) != split.tokens for split in (train, val)):
        raise ValueError(f"tokens and marks are not whole rows of {row}")
    fraction = float(content["val_fraction"])
    return Manifest(dtype, vocab_size, content["tokenizer"], content["source"], fraction, train, val, row=row)


def _split(content: dict[str, Any], width: int) -> SplitInfo:
    files, marks = _shard_files(content["files"], width), _shard_files(content.get("marks", ()), 2)
    tokens = _count(content, "tokens")
    if tokens != sum(file.tokens for file in files):
        raise ValueError(f"the files do not add up to {tokens} tokens")
    entries = content.get("index", ())
    index = tuple(IndexFile(_file_name(entry), _count(entry, "size"), str(entry["sha256"])) for entry in entries)
    if len(index) not in (0, 2):
        raise ValueError(f"an index has two files, not {len(index)}")
    return SplitInfo(tokens, _count(content, "documents"), _count(content, "bytes"), files, index, marks)


def _shard_files(entries: Iterable[dict[str, Any]], width: int) -> tuple[ShardFile, ...]:
    files = []
    for entry in entries:
        tokens, size, offset = (_count(entry, key) for key in ("tokens", "size", "offset"))
        file = ShardFile(_file_name(entry), tokens, size, str(entry["sha256"]), offset)
        if size != offset + tokens * width:
            raise ValueError(f"{file.name}: {tokens} tokens do not fill {size} bytes")
        files.append(file)
    return tuple(files)


def _file_name(entry: dict[str, Any]) -> str:
    name = entry["name"]
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r} is not a plain name")
    return name


def _count(content: dict[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{key} = {value!r} is not a count")
    return value
