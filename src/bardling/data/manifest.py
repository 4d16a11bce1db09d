"""`manifest.json`: what a dataset folder holds, with a checksum for each file and a digest of itself.

A manifest from outside is checked field by field before anything is allocated or opened: plain file names only, sizes that
agree with token counts, and a digest that no hand has changed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bardling.errors import UserError
from bardling.files import told_plainly, write_whole

FORMAT = 1
SplitName = Literal["train", "val"]
_LARGEST_MANIFEST = 64 << 20  # bytes; about 400,000 files
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # plain names only: never a path that leaves the folder


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest width that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardFile:
    """One file of tokens."""

    name: str
    tokens: int
    size: int
    """Bytes in the whole file."""
    sha256: str
    """Checksum of the whole file; empty when none is known."""
    offset: int = 0
    """Bytes before the first token."""


@dataclass(frozen=True)
class IndexFile:
    """A file that says where documents begin, or what they are called (`documents.py`)."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split of a dataset."""

    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text; 0 when unknown."""
    files: tuple[ShardFile, ...]
    index: tuple[IndexFile, ...] = ()
    """Where documents begin, and their names; none in datasets made before there was an index."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder says of itself."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer; empty when the dataset has none."""
    source: Mapping[str, Any]
    """Where the text came from: spec, identity, and how it was split."""
    val_fraction: float
    train: SplitInfo
    val: SplitInfo
    format: int = field(default=FORMAT)

    @property
    def fingerprint(self) -> str:
        """Digest of the tokens and their vocabulary; equal for equal data, wherever and whenever it was made."""
        files = [[[file.sha256 or file.name, file.tokens] for file in split.files] for split in (self.train, self.val)]
        return _digest({"dtype": self.dtype, "vocab_size": self.vocab_size, "tokenizer": self.tokenizer, "files": files})[:16]

    def to_json(self) -> str:
        """The text of `manifest.json`, with a digest of the rest."""
        content = asdict(self)
        return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; a folder without one is no dataset, so it is written last."""
    write_whole(folder / "manifest.json", manifest.to_json().encode())


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; the files that it names are not looked at.

    Raises:
        UserError: if it is missing, damaged, edited or of another format.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: not found, so {path.parent} is no prepared dataset: make one with `bardling prepare SOURCE --out DIR`"
        )
    with told_plainly(path, "read"), path.open("rb") as file:
        data = file.read(_LARGEST_MANIFEST + 1)
    if len(data) > _LARGEST_MANIFEST:
        raise UserError(f"{path}: is over {_LARGEST_MANIFEST >> 20} MiB, so it is no manifest")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON, so it is damaged: prepare the dataset again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object, so it is no manifest")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {content.get('format')!r} is not the one read here, {FORMAT}: prepare the dataset again"
        )
    if content.pop("digest", None) != _digest(content):
        raise UserError(f"{path}: its digest does not fit its content, so it was changed or damaged: prepare the dataset again")
    try:
        return _checked(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is no valid manifest ({error}): prepare the dataset again") from error


def _checked(content: dict[str, Any]) -> Manifest:
    """The manifest that `content` says, or a ValueError, KeyError or TypeError about the first thing that cannot be."""
    dtype, vocab_size = content["dtype"], _count(content, "vocab_size")
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {dtype!r} is neither 'uint16' nor 'uint32'")
    if not 1 <= vocab_size <= 1 << (16 if dtype == "uint16" else 32):
        raise ValueError(f"a vocabulary of {vocab_size} does not fit {dtype}")
    if not isinstance(content["tokenizer"], str) or not isinstance(content["source"], dict):
        raise ValueError("tokenizer must be text and source an object")
    width = 2 if dtype == "uint16" else 4
    return Manifest(
        dtype,
        vocab_size,
        content["tokenizer"],
        content["source"],
        float(content["val_fraction"]),
        _split(content["train"], width),
        _split(content["val"], width),
    )


def _split(content: dict[str, Any], width: int) -> SplitInfo:
    files = []
    for entry in content["files"]:
        name = entry["name"]
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ValueError(f"file name {name!r} is not a plain name")
        file = ShardFile(name, _count(entry, "tokens"), _count(entry, "size"), str(entry["sha256"]), _count(entry, "offset"))
        if file.size != file.offset + file.tokens * width:
            raise ValueError(f"{name}: {file.tokens} tokens do not fill {file.size} bytes")
        files.append(file)
    tokens = _count(content, "tokens")
    if tokens != sum(file.tokens for file in files):
        raise ValueError(f"the files do not hold {tokens} tokens together")
    index = []
    for entry in content.get("index", ()):
        if not isinstance(entry["name"], str) or not _FILE_NAME.fullmatch(entry["name"]):
            raise ValueError(f"file name {entry['name']!r} is not a plain name")
        index.append(IndexFile(entry["name"], _count(entry, "size"), str(entry["sha256"])))
    if len(index) not in (0, 2):
        raise ValueError(f"an index has two files, not {len(index)}")
    return SplitInfo(tokens, _count(content, "documents"), _count(content, "bytes"), tuple(files), tuple(index))


def _count(content: dict[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{key} = {value!r} is not a count")
    return value
