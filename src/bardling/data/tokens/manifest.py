"""`manifest.json`: the contents of a dataset folder, with a checksum of each file and a digest of the manifest itself.

A manifest may come from anywhere, so it is checked field by field before anything is allocated or opened: file names are plain,
sizes agree with token counts, and the digest matches the content.
"""

import json
import re
from collections.abc import Mapping
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

    def split(self, name: SplitName) -> SplitInfo:
        return self.train if name == "train" else self.val

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens and their vocabulary; equal for equal data, wherever and whenever it was prepared."""
        files = [[[file.sha256 or file.name, file.tokens] for file in split.files] for split in (self.train, self.val)]
        return _digest({"dtype": self.dtype, "vocab_size": self.vocab_size, "tokenizer": self.tokenizer, "files": files})[:16]


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
    return Manifest(dtype, vocab_size, content["tokenizer"], content["source"], float(content["val_fraction"]), train, val)


def _split(content: dict[str, Any], width: int) -> SplitInfo:
    files = []
    for entry in content["files"]:
        tokens, size, offset = (_count(entry, key) for key in ("tokens", "size", "offset"))
        file = ShardFile(_file_name(entry), tokens, size, str(entry["sha256"]), offset)
        if size != offset + tokens * width:
            raise ValueError(f"{file.name}: {tokens} tokens do not fill {size} bytes")
        files.append(file)
    tokens = _count(content, "tokens")
    if tokens != sum(file.tokens for file in files):
        raise ValueError(f"the files do not add up to {tokens} tokens")
    entries = content.get("index", ())
    index = tuple(IndexFile(_file_name(entry), _count(entry, "size"), str(entry["sha256"])) for entry in entries)
    if len(index) not in (0, 2):
        raise ValueError(f"an index has two files, not {len(index)}")
    return SplitInfo(tokens, _count(content, "documents"), _count(content, "bytes"), tuple(files), index)


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
