"""Where text comes from: a stream of documents, and a digest that changes when the files do.

A source is named by one string: 'stdlib' (the Python standard library's own sources: real text of about 10 MB that every
machine has), a text file, a folder, a glob pattern, or FILE.jsonl[:FIELD]. Every file is one document, except that each line
of a `.jsonl` file is one. Files come in the sorted order of their paths, whatever order the system lists them in.

Text is UTF-8, taken as it is: line ends are kept, only a byte order mark is dropped. Files that are named (alone or by a glob)
must be text; of a folder, files that are not UTF-8 or empty and hidden ones are passed over.

Limits: one file that is not JSON Lines is read whole into memory.
"""

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from bardling.data.vocabulary import valid_text
from bardling.errors import UserError, closest
from bardling.files import told_plainly

STDLIB = "stdlib"
_DEFAULT_FIELD = "text"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library that are passed over: tests, what is not part of it, and tables that programs wrote."""


class Document(NamedTuple):
    """One text, and what to call it in messages."""

    name: str
    text: str


class Source(Protocol):
    """A stream of documents that can be started again."""

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order each time; empty ones are left out."""
        ...

    def identity(self) -> str:
        """Hexadecimal digest of the spec and of each file's path, size and time of change."""
        ...

    def size(self) -> int:
        """Bytes of the files together, to show progress."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Documents from files.

    Attributes:
        name: short name.
        root: what the documents' names are relative to.
        files: in the order in which they are read.
        field: which field of a line of JSON Lines holds the text.
        lenient: whether files that are not UTF-8 are passed over.
        release: version of what the files belong to, where they have one.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    field: str = _DEFAULT_FIELD
    lenient: bool = False
    release: str = ""

    def documents(self) -> Iterator[Document]:
        """All documents that are not empty.

        Raises:
            UserError: naming file and line, if one is not text, not JSON Lines or lacks the field, or if all are empty.
        """
        found = False
        for path in self.files:
            for document in self._lines(path) if path.suffix == ".jsonl" else self._whole(path):
                if document.text:
                    found = True
                    yield document
        if not found:
            what = "is empty" if len(self.files) == 1 else f"none of its {len(self.files)} files has any UTF-8 text"
            raise UserError(
                f"{self.root if len(self.files) != 1 else self.files[0]}: {what}: name a source that has text in it"
            )

    def _whole(self, path: Path) -> Iterator[Document]:
        with told_plainly(path, "read"):
            data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if self.lenient:
                return
            raise UserError(
                f"{path}: is not UTF-8 text (byte {error.start:,} is 0x{data[error.start]:02x}): "
                "convert it, for instance with `iconv -f latin1 -t utf-8`, or name only text files"
            ) from error
        if not (self.lenient and "\0" in text[:8192]):  # binary files that happen to be valid UTF-8
            yield Document(self._label(path), text)

    def _lines(self, path: Path) -> Iterator[Document]:
        with told_plainly(path, "read"), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"{path}: line {number} is not JSON ({reason}): each line must be one JSON object"
                    ) from error
                yield Document(f"{self._label(path)}:{number}", self._text(path, number, record))

    def _text(self, path: Path, number: int, record: object) -> str:
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is no JSON object, but each line must be one with a field {self.field!r}")
        if self.field not in record:
            fields = ", ".join(map(repr, list(record)[:8])) or "none"
            raise UserError(
                f"{path}: line {number} has no field {self.field!r}{closest(self.field, list(record))}; it has {fields}: "
                f"name the one with the text, as in {path.name}:FIELD"
            )
        text = record[self.field]
        if not isinstance(text, str):
            raise UserError(
                f"{path}: line {number}, field {self.field!r} holds {type(text).__name__}, not text: name another field"
            )
        return valid_text(text)  # JSON can name half a surrogate pair

    def _label(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def identity(self) -> str:
        """Digest that changes when a file is added, removed, renamed or edited, or the spec asks for another field."""
        seen = hashlib.sha256(json.dumps([self.name, str(self.root), self.field, self.lenient, self.release]).encode())
        for path in self.files:
            with told_plainly(path, "read"):
                facts = path.stat()
            seen.update(json.dumps([self._label(path), facts.st_size, facts.st_mtime_ns]).encode())
        return seen.hexdigest()

    def size(self) -> int:
        """Bytes of all files together."""
        with told_plainly(self.root, "read"):
            return sum(path.stat().st_size for path in self.files)


def open_source(spec: str) -> Source:
    """Find the files that a spec names; they are read only when documents are asked for.

    Raises:
        UserError: if nothing is there, naming the nearest thing that is.
    """
    if spec == STDLIB:
        return _stdlib()
    path, field = Path(spec).expanduser(), _DEFAULT_FIELD
    if not path.exists() and not _matches(spec):
        before, colon, after = spec.rpartition(":")
        if colon and after and os.sep not in after and (Path(before).expanduser().exists() or _matches(before)):
            spec, field, path = before, after, Path(before).expanduser()
    if path.is_file():
        _only_jsonl(spec, field, [path])
        return FileSource(_slug(path), path.resolve().parent, (path.resolve(),), field)
    if path.is_dir():
        if (path / "manifest.json").is_file() and any(path.glob("train-*.bin")):
            raise UserError(f"{path}: is a prepared dataset, not text: train on it as it is, with --data.source {path}")
        root = path.resolve()
        files = tuple(_below(root, left_out=frozenset()))
        if not files:
            raise UserError(f"{path}: this folder has no files: name one that has text files in it")
        _only_jsonl(spec, field, files)
        return FileSource(_slug(root), root, files, field, lenient=True)
    if glob.has_magic(spec):
        found = [Path(match).resolve() for match in _matches(spec)]
        if not found:
            raise UserError(f"data.source = {spec!r}: no file matches this pattern")
        files = tuple(sorted(set(found)))
        _only_jsonl(spec, field, files)
        return FileSource(_slug(files[0].parent), Path(os.path.commonpath([file.parent for file in files])), files, field)
    if path.exists():
        raise UserError(f"{path}: is neither a file nor a folder")
    raise UserError(f"data.source = {spec!r}: no such file or folder{_nearby(path)}; {STDLIB!r} is text that every machine has")


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib")).resolve()
    # _sysconfigdata holds the settings of the machine that built Python, not code that someone wrote
    files = tuple(
        path for path in _below(root, left_out=_LEFT_OUT) if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
    )
    if not files:
        raise UserError(
            f"{root}: this Python has no sources of its standard library: name a text file or folder as data.source"
        )
    return FileSource(
        STDLIB, root, files, lenient=True, release=f"{platform.python_implementation()} {platform.python_version()}"
    )


def _below(root: Path, left_out: frozenset[str] | set[str]) -> list[Path]:
    """Files below a folder that are not hidden, sorted by their relative paths; links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    return [match for match in glob.glob(os.path.expanduser(pattern), recursive=True) if Path(match).is_file()]  # noqa: PTH111, PTH207


def _only_jsonl(spec: str, field: str, files: tuple[Path, ...] | list[Path]) -> None:
    if field != _DEFAULT_FIELD and not any(path.suffix == ".jsonl" for path in files):
        raise UserError(f"data.source = {spec + ':' + field!r}: only .jsonl files have fields, and there is none here")


def _slug(path: Path) -> str:
    kept = "".join(character if character.isalnum() and character.isascii() else "-" for character in path.stem)
    return kept.strip("-").lower()[:40] or "text"


def _nearby(path: Path) -> str:
    """What in the same folder has a name like the one that is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    return closest(path.name, [*names, STDLIB] if folder == Path() else names)
